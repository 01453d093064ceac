"""`megakd train`: check everything that can be checked without ranks, then start them."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from megakd.cli.rank_options import add_rank_options, load_for_ranks
from megakd.common.errors import UserError
from megakd.common.stop_request import RESUME_STATUS
from megakd.config.schema import Config
from megakd.launch.launcher import run_action
from megakd.launch.nodes import Nodes


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
    try:
        with _signals_that_end():
            config, world_size, nodes = check_configuration(args, accept_changes=args.accept_changes)
    except _Stopped as stopped:
        print(f"stopped by {stopped} before the ranks were started; the same command starts them", file=sys.stderr)
        return RESUME_STATUS
    flags = ["accept-changes"] if args.accept_changes else []
    status = run_action("train", config, world_size, flags=flags, max_restarts=args.max_restarts, nodes=nodes)
    if status == 0 and nodes.rank == 0:
        print(f"how it went: ./launch.sh report {shlex.quote(config.run.output_dir)}")
    return status


def check_configuration(args: argparse.Namespace, *, accept_changes: bool = True) -> tuple[Config, int, Nodes]:
    """`load_for_ranks`, and all checks that need no ranks.

    Args:
        accept_changes: settings may be others than those of the checkpoint that the action goes on from.

    Raises:
        UserError: the configuration, a file it names or the number of ranks cannot be used.
    """
    config, world_size, nodes = load_for_ranks(args)

    from megakd.training.preflight import preflight

    preflight(config, world_size, accept_changes=accept_changes)
    return config, world_size, nodes


class _Stopped(BaseException):
    """A signal that means "save, and end" came when there was nothing to save."""


@contextmanager
def _signals_that_end() -> Iterator[None]:
    """Inside, the signals that a run saves after end it; checks of large models and data take a while."""

    def stop(number: int, _: object) -> None:
        raise _Stopped(signal.Signals(number).name)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
