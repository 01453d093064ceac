"""`evaluate`: held-out scores of a run's newest checkpoint, or of the student it would start from."""

from __future__ import annotations

import argparse

from megakd.cli.rank_options import add_rank_options


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("evaluate", help="score a run's newest checkpoint on its held-out data")
    add_rank_options(parser)


def run(args: argparse.Namespace) -> int:
    """Check, then evaluate under torchrun. Returns the exit status."""
    from megakd.cli.train_command import check_configuration
    from megakd.launch.launcher import run_action

    config, world_size, nodes = check_configuration(args)
    return run_action("evaluate", config, world_size, nodes=nodes)
