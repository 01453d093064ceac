"""`megakd report`: how runs went, as one page and its figures."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("report", help="show how runs went: one HTML file, and its figures as PNG")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run (run.output_dir), also of one going on")
    parser.add_argument(
        "--output",
        metavar="FILE",
        default=None,
        help="the page (default: RUN/report.html, or ./report.html for several runs); the figures go into a folder of "
        "the same name",
    )
    parser.add_argument("--log-loss", action="store_true", help="losses on logarithmic axes")


def run(args: argparse.Namespace) -> int:
    """Write the report. Returns 0."""
    from megakd.report.writing import write_report

    folders = [Path(folder) for folder in args.runs]
    output = Path(args.output) if args.output is not None else None
    page, figures = write_report(folders, output, log_loss=args.log_loss)
    print(f"report: {page}\nfigures: {figures / '*.png'}")
    return 0
