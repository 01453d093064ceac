"""`evaluate`: held-out scores of a run's newest checkpoint, or of the student it would start from."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("evaluate", help="score a run's newest checkpoint on its held-out data")
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--nproc-per-node", type=int, default=None, help="ranks to start (default: GPUs, or TP x PP)")


def run(args: argparse.Namespace) -> int:
    """Check, then evaluate under torchrun. Returns the exit status."""
    from megakd.cli.train_command import run_configuration

    return run_configuration("evaluate", args)
