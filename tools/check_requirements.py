"""Say whether this Python has what megakd needs, from package metadata alone: no heavy import, no third-party code."""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULES = {"megatron-core": "megatron.core", "PyYAML": "yaml", "types-PyYAML": None, "pytest-xdist": "xdist"}
OPERATORS: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    ">=": lambda have, want: have >= want,
    "<": lambda have, want: have < want,
    "==": lambda have, want: have == want,
}


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version without trailing zeros: "2.9.0a0+cu13.nv25" is (2, 9).

    Suffixes are left out on purpose: vendors' images carry alpha builds of what they ship as the release.
    """
    match = re.match(r"\d+(\.\d+)*", version)
    if match is None:
        raise ValueError(f"version {version!r} does not start with a number")
    numbers = [int(part) for part in match.group().split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def problem(requirement: str) -> str | None:
    """What is wrong with a requirement such as "numpy>=1.26,<3", or None where it is met."""
    match = re.fullmatch(r"([A-Za-z0-9._-]+)((?:(?:>=|<|==)[0-9.]+,?)*)", requirement)
    if match is None:
        raise ValueError(f"cannot read requirement {requirement!r}; write name>=1.2,<3")
    name, bounds = match.groups()
    try:
        have = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is not installed"
    for operator, want in re.findall(r"(>=|<|==)([0-9.]+)", bounds):
        if not OPERATORS[operator](release(have), release(want)):
            return f"{name} {have} is installed, {bounds} is needed"
    module = MODULES.get(name, name)
    if module is not None and util.find_spec(module) is None:
        return f"{name} {have} is installed but {module} cannot be found"
    return None


def declared(setup_file: Path, lists: list[str]) -> list[str]:
    """The requirements in setup.py's lists of these names."""
    found: dict[str, list[str]] = {}
    for node in ast.parse(setup_file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in lists:
            found[node.targets[0].id] = ast.literal_eval(node.value)
    return [requirement for name in lists for requirement in found[name]]


def main(argv: list[str]) -> int:
    """Exit with 0 where everything is there, else with 1 after one line per problem."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dev", action="store_true", help="also what the tests and checks need")
    args = parser.parse_args(argv)
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        print(f"Python {sys.version.split()[0]} runs this; 3.10 to 3.13 is needed")
        return 1
    lists = ["INSTALL_REQUIRES", *(["DEV_REQUIRES"] if args.dev else [])]
    problems = [text for text in map(problem, declared(ROOT / "setup.py", lists)) if text]
    print("\n".join(problems), end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
