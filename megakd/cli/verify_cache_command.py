"""`megakd verify-cache`: read every record of a teacher cache."""

from __future__ import annotations

import argparse
import sys


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("verify-cache", help="read and check every record of a teacher cache")
    parser.add_argument("folder", help="folder of the cache")


def run(args: argparse.Namespace) -> int:
    """Check. Returns 0, or 1 where something is wrong."""
    from megakd.cache.reader import CacheReader
    from megakd.cache.verifying import find_faults

    reader = CacheReader(args.folder)
    faults = 0
    for fault in find_faults(reader):
        print(fault, file=sys.stderr)
        faults += 1
    manifest = reader.manifest
    if faults:
        print(f"error: {args.folder} is damaged in {faults} places. Write the cache again.", file=sys.stderr)
        return 1
    print(f"{args.folder}: {manifest.samples:,} samples, {manifest.rows:,} rows, {manifest.bytes:,} bytes: all is well")
    return 0
