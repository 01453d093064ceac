"""`megakd cache`: run the teacher once and keep what it says for any number of students."""

from __future__ import annotations

import argparse

from megakd.cli.rank_options import add_rank_options, load_for_ranks
from megakd.config.layouts import with_teacher_alone


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("cache", help="write what the teacher says of the training data, for many students")
    add_rank_options(parser, "YAML file; its parallel section is the teacher's layout here")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--dry-run", action="store_true", help="compute a few samples, tell size and time, write nothing")
    kind.add_argument("--overwrite", action="store_true", help="begin anew where a cache is, or was begun")


def run(args: argparse.Namespace) -> int:
    """Check, then run the teacher under torchrun. Returns the exit status."""
    from megakd.launch.launcher import run_action

    config, world_size, nodes = load_for_ranks(args, with_teacher_alone)

    from megakd.training.preflight import preflight_cache

    preflight_cache(config, world_size)
    flags = [name for name in ("dry-run", "overwrite") if getattr(args, name.replace("-", "_"))]
    return run_action("cache", config, world_size, flags=flags, nodes=nodes)
