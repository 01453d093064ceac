"""The front door: finds the command, runs it, and turns a UserError into one line and status 2."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from megakd._version import __version__
from megakd.common.errors import UserError, nearest
from megakd.common.logging import configure_logging

# Each module has `add_parser(subparsers)` and `run(args) -> exit status`, and is imported only where it is needed.
COMMANDS = {
    "train": "megakd.cli.train_command",
    "plan": "megakd.cli.plan_command",
    "evaluate": "megakd.cli.evaluate_command",
    "cache": "megakd.cli.cache_command",
    "inspect-cache": "megakd.cli.inspect_cache_command",
    "verify-cache": "megakd.cli.verify_cache_command",
    "report": "megakd.cli.report_command",
    "quickstart": "megakd.cli.quickstart_command",
    "config": "megakd.cli.config_command",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command as `python -m megakd` does and return the exit status; `argv` defaults to the process's.

    Raises:
        SystemExit: argparse's way out: status 0 after --help and --version, 2 for arguments a command does not have.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    configure_logging()
    try:
        return _dispatch(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _dispatch(arguments: list[str]) -> int:
    if arguments and arguments[0].startswith("-"):
        # Options may stand before the command, as torchrun's do.
        place = next((index for index, argument in enumerate(arguments) if argument in COMMANDS), 0)
        arguments = [arguments[place], *arguments[:place], *arguments[place + 1 :]]
    name = arguments[0] if arguments else None
    if name in COMMANDS:
        _, subparsers = _build_parser([name])
        # Lets options stand between a file and its overrides, which nested parsers do not.
        args = subparsers.choices[name].parse_intermixed_args(arguments[1:])
        return int(importlib.import_module(COMMANDS[name]).run(args))
    choices = f"Commands: {', '.join(COMMANDS)}."
    if name is None:
        raise UserError(f"no command given. {choices}")
    if not name.startswith("-"):
        raise UserError(f"'{name}' is not a command.{nearest(name, COMMANDS)} {choices}")
    parser, _ = _build_parser(list(COMMANDS))
    parser.parse_args(arguments)
    parser.error("the command must come first")


def _build_parser(
    commands: list[str],
) -> tuple[argparse.ArgumentParser, argparse._SubParsersAction[argparse.ArgumentParser]]:
    """The parser with the commands named; building one imports its module."""
    parser = argparse.ArgumentParser(
        prog="python -m megakd",
        description="Distil large GPT models into small ones.",
        epilog="python -m megakd COMMAND --help tells more.",
    )
    parser.add_argument("--version", action="version", version=f"megakd {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND")
    for name in commands:
        importlib.import_module(COMMANDS[name]).add_parser(subparsers)
    return parser, subparsers
