"""What a page names and the repository does not have: keys, commands, options, files, anchors, YAML that is refused."""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import re
import shlex
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from megakd.cli.main import COMMANDS
from megakd.common.errors import UserError
from megakd.config.load import config_from_dict
from megakd.config.schema import Config
from tests.config.examples import VALID
from tests.config.keys import config_keys
from tests.docs.pages import ROOT, Page, Piece, read_page

SECTIONS = tuple(Config.model_fields)
KEYS = frozenset(config_keys())
TOP_LEVEL = ("configs", "docs", "megakd", "tests", "tools")

_KEY = re.compile(rf"(?<![\w./<-])((?:{'|'.join(SECTIONS)})(?:\.[a-z_0-9]+)+)(?![\w*]*/)")
_ENDINGS = ("json", "jsonl", "yaml", "bin", "idx", "md", "py", "txt")
_PATH = re.compile(rf"(?<![\w./-])((?:{'|'.join(TOP_LEVEL)})/[\w./*{{}},-]+|launch\.sh|setup\.py|pyproject\.toml)")


def find_faults(page: Page, *, foreign_first_cells: bool = False) -> list[str]:
    """One line per thing that is named and not there.

    Args:
        foreign_first_cells: the first cell of a table's row names another program's options.
    """
    foreign = {row.line: row.text.split("|")[1] for row in page.table_rows} if foreign_first_cells else {}
    spans = [span for span in page.spans if f"`{span.text}`" not in foreign.get(span.line, "")]
    faults = []
    for span in spans:
        faults += _at(page, span, _unknown_keys(span.text))
        faults += _at(page, span, _missing_files(span.text))
    for block in page.blocks:
        if block.language == "yaml":
            faults += _at(page, block, _refused_yaml(block.text))
    for command in page.commands():
        faults += _at(page, command, _wrong_command(command.text))
    for link in page.links:
        faults += _at(page, link, _broken_link(page, link.text))
    return faults


def _at(page: Page, piece: Piece, problems: Iterator[str]) -> list[str]:
    name = page.path.relative_to(ROOT) if page.path.is_relative_to(ROOT) else page.path
    return [f"{name}:{piece.line}: {problem}" for problem in problems]


def _unknown_keys(text: str) -> Iterator[str]:
    for key in _KEY.findall(text):
        if key.rsplit(".", 1)[1] not in _ENDINGS and key not in KEYS:
            yield f"there is no key {key}"


def _missing_files(text: str) -> Iterator[str]:
    for name in _PATH.findall(text):
        name = name.rstrip(".,")
        if not any(ROOT.glob(name)):
            yield f"there is no file {name}"


def _refused_yaml(text: str) -> Iterator[str]:
    """A block is a configuration or a part of one: what is lacking is put in."""
    try:
        values = yaml.safe_load(text)
        if not isinstance(values, Mapping):
            raise UserError("it is no mapping of sections")
        config_from_dict(_merged(VALID, values))
    except (yaml.YAMLError, UserError) as error:
        yield f"the YAML is refused: {error}"


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(dict(below))
    for key, value in above.items():
        inner = result.get(key)
        result[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return result


def _wrong_command(text: str) -> Iterator[str]:
    words = _words(text)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if words[0].endswith("launch.sh"):
        yield from _wrong_launch(words[1:])
    elif words[1:3] == ["-m", "megakd"]:
        yield from _wrong_launch(words[3:])
    else:
        yield from _wrong_tool(words[1], words[2:])
    yield from _missing_files(" ".join(words))


def _words(text: str) -> list[str]:
    """A command's words up to a comment, a pipe, a redirection or the next command."""
    text = re.sub(r"\$'((?:[^'\\]|\\.)*)'", lambda match: shlex.quote(match[1]), text)
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:
        if set(word) <= set("|&;<>"):
            break
        words.append(word)
    return words


def _wrong_launch(words: list[str]) -> Iterator[str]:
    if not words or words[0] in ("test", "COMMAND"):
        return
    name, *rest = words
    if name not in COMMANDS:
        yield f"there is no command {name}"
        return
    actions = _launch_options(name)
    for number, word in enumerate(rest):
        if word.startswith("-"):
            option, _, value = word.partition("=")
            action = actions.get(option)
            following = rest[number + 1] if number + 1 < len(rest) else ""
            yield from _wrong_option(name, option, action, value or following)
        elif found := re.match(rf"((?:{'|'.join(SECTIONS)})(?:\.[\w]+)+)=", word):
            yield from _unknown_keys(found[1])
        elif re.fullmatch(r"[\w.]+=\S*", word) and word != "section.key=value":
            yield f"there is no section of {word}"


def _wrong_option(name: str, option: str, action: argparse.Action | None, value: str) -> Iterator[str]:
    if action is None:
        yield f"{name} has no option {option}"
    elif action.choices is not None and value not in [str(choice) for choice in action.choices]:
        yield f"{name} {option} cannot be {value}"


@cache
def _launch_options(name: str) -> Mapping[str, argparse.Action]:
    subparsers = argparse.ArgumentParser().add_subparsers()
    importlib.import_module(COMMANDS[name]).add_parser(subparsers)
    options: Mapping[str, argparse.Action] = subparsers.choices[name]._option_string_actions
    return options


def _wrong_tool(path: str, words: list[str]) -> Iterator[str]:
    options = tool_options(ROOT / path) if (ROOT / path).is_file() else frozenset(words)
    for word in words:
        option = word.partition("=")[0]
        if option.startswith("-") and option not in options:
            yield f"{path} has no option {option}"


@cache
def tool_options(path: Path) -> frozenset[str]:
    """The options that a script declares, read from its source: importing it may need torch, or do more."""
    options = {"-h", "--help"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
        ):
            continue
        names = [a.value for a in node.args if isinstance(a, ast.Constant) and str(a.value).startswith("-")]
        options |= set(names)
        if any("BooleanOptionalAction" in ast.unparse(keyword.value) for keyword in node.keywords):
            options |= {name.replace("--", "--no-", 1) for name in names}
    return frozenset(options)


def _broken_link(page: Page, link: str) -> Iterator[str]:
    if re.match(r"[a-z]+:", link):
        return
    name, _, anchor = link.partition("#")
    target = page.path.parent / name
    if name and not target.exists():
        yield f"the link to {link} leads nowhere"
    elif anchor and anchor not in (read_page(target) if name else page).anchors:
        yield f"{name or 'the page'} has no heading #{anchor}"
