"""`quickstart`: the main job from nothing, on what the repository and the Python interpreter bring along."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from megakd.common.errors import UserError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "quickstart", help="distil the small teacher in configs/quickstart on this machine and report"
    )
    parser.add_argument("--output-dir", default="runs/quickstart", help="folder for data, runs and the student")
    parser.add_argument("--steps", type=int, default=None, help="training steps instead of the configuration's")


def run(args: argparse.Namespace) -> int:
    """Prepare the text, distil, train the comparison, report. Returns the exit status."""
    from megakd.report import quickstart

    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps is {args.steps}; it must be at least 1.")
    started = time.monotonic()
    status = quickstart.run_quickstart(Path(args.output_dir), args.steps)
    if status == 0:
        print(f"\nquickstart took {time.monotonic() - started:.0f} s")
    return status
