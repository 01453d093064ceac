"""`megakd inspect-cache`: what a teacher cache is of, and examples of what it holds."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("inspect-cache", help="print a teacher cache's manifest and a few of its rows")
    parser.add_argument("folder", help="folder of the cache")
    parser.add_argument("--sample", type=int, default=None, metavar="ID", help="which sample (default: the first)")
    parser.add_argument("--positions", type=int, default=5, metavar="N", help="rows shown of it (default: 5)")


def run(args: argparse.Namespace) -> int:
    """Print. Returns 0."""
    from megakd.cache.inspecting import describe_cache, describe_sample
    from megakd.cache.reader import CacheReader

    reader = CacheReader(args.folder)
    for line in describe_cache(reader):
        print(line)
    for line in describe_sample(reader, args.sample, args.positions):
        print(line)
    return 0
