"""Messages that docs/troubleshooting.md quotes are messages of megakd."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.docs.pages import ROOT, read_page

PAGE = ROOT / "docs" / "troubleshooting.md"
VALUE = "\0"


@cache
def templates() -> str:
    """All texts in the sources, a value that is put in as VALUE, one per line."""
    found = []
    for path in (ROOT / "megakd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else VALUE for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def is_known(message: str) -> bool:
    """Whether a quoted message, `...` for any values, is part of a text in the sources."""
    pieces = [re.escape(piece) for piece in message.split("...")]
    return re.search(r"[^\n]*".join(pieces), templates()) is not None


def quoted() -> list[str]:
    """The code in first cells under the heading `message`."""
    rows, found, in_messages = read_page(PAGE).table_rows, [], False
    for row in rows:
        first = row.text.split("|")[1].strip()
        if not first.startswith("`"):
            in_messages = first == "message" or (in_messages and set(first) == {"-"})
        elif in_messages:
            found.append(first.split("`")[1])
    return found


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_exists(message: str) -> None:
    assert is_known(message)


def test_messages_are_found_and_others_are_not() -> None:
    assert len(quoted()) > 35
    assert is_known("distill.temperature is ...; it must be > 0")
    assert not is_known("distill.temperature was ...; it must be > 0")
