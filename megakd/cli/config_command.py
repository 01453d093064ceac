"""`config`: what a configuration resolves to, and the schema of all of them. Imports no torch."""

from __future__ import annotations

import argparse
import json

from megakd.common.errors import UserError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("config", help="check a configuration and print it with all defaults")
    parser.add_argument("config", nargs="?", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--world-size", type=int, help="also check the layout and batch against this many ranks")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of configuration files instead")


def run(args: argparse.Namespace) -> int:
    """Print the resolved YAML, or the JSON schema. Returns the exit status."""
    from megakd.config.checks import check_config
    from megakd.config.load import config_schema, dump_config, load_config

    if args.schema:
        if args.config is not None:
            raise UserError(f"--schema stands alone; '{args.config}' would have no effect. Leave one of them out.")
        print(json.dumps(config_schema(), indent=2))
        return 0
    if args.config is None:
        raise UserError("config needs a YAML file, or --schema.")
    if args.world_size is not None and args.world_size < 1:
        raise UserError(f"--world-size is {args.world_size}; it must be at least 1.")
    config = load_config(args.config, args.overrides)
    check_config(config, args.world_size)
    print(dump_config(config), end="")
    return 0
