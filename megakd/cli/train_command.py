"""`megakd train`: check everything that can be checked without ranks, then start them."""

from __future__ import annotations

import argparse

from megakd.cli.rank_options import add_rank_options, load_for_ranks
from megakd.common.errors import UserError
from megakd.launch.launcher import run_action


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("train", help="distil a student as a configuration says")
    add_rank_options(parser)
    parser.add_argument("--max-restarts", type=int, default=0, help="times the ranks start again after a failure")
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="go on from a checkpoint although settings that change the result are others now",
    )


def run(args: argparse.Namespace) -> int:
    """Check, then train under torchrun. Returns the exit status."""
    if args.max_restarts < 0:
        raise UserError(f"--max-restarts is {args.max_restarts}; it must be at least 0.")
    return run_configuration("train", args, args.max_restarts, accept_changes=args.accept_changes)


def run_configuration(
    action: str, args: argparse.Namespace, max_restarts: int = 0, *, accept_changes: bool = True
) -> int:
    """Load `args.config` with `args.overrides`, check it, run the action on `args.nproc_per_node` or the default ranks.

    Args:
        accept_changes: settings may be others than those of the checkpoint that the action goes on from.

    Raises:
        UserError: the configuration, a file it names or the number of ranks cannot be used; no rank has started.
    """
    config, world_size, nodes = load_for_ranks(args)

    from megakd.training.preflight import preflight

    preflight(config, world_size, accept_changes=accept_changes)
    flags = ["accept-changes"] if action == "train" and accept_changes else []
    return run_action(action, config, world_size, flags=flags, max_restarts=max_restarts, nodes=nodes)
