"""A page of documentation taken apart: code spans, code blocks, links and headings, each with its line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r"^\s*```(\w*)\s*$")
_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", flags=re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_PROMPT = re.compile(r"^\s*\$ ")


@dataclass
class Piece:
    """Some text of a page and the line it begins at."""

    line: int
    text: str
    language: str = ""


@dataclass
class Page:
    """What a page names."""

    path: Path
    spans: list[Piece] = field(default_factory=list)
    blocks: list[Piece] = field(default_factory=list)
    links: list[Piece] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    table_rows: list[Piece] = field(default_factory=list)

    def commands(self) -> list[Piece]:
        """Command lines in blocks and spans, their continuation lines joined and comments left out."""
        found = []
        for block in self.blocks:
            if block.language in ("", "bash", "sh", "console"):
                found += _command_lines(block)
        found += [span for span in self.spans if _is_command(span.text)]
        return found


def read_page(path: Path) -> Page:
    """Take a Markdown file apart; of a YAML file, the commands in its comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        comments = re.sub(r"^(?!#).*$", "", text, flags=re.MULTILINE)
        return Page(path, blocks=[Piece(1, re.sub(r"^# ?", "", comments, flags=re.MULTILINE))])
    return parse_page(path, text)


def parse_page(path: Path, text: str) -> Page:
    """The same of Markdown text."""
    page, prose, block = Page(path), [], None
    for number, line in enumerate(text.splitlines(), 1):
        fence = _FENCE.match(line)
        if fence and block is None:
            block = Piece(number + 1, "", fence[1])
        elif fence and block is not None:
            page.blocks.append(block)
            block = None
        elif block is not None:
            block.text += line + "\n"
        prose.append("" if block is not None or fence else line)
    assert block is None, f"{path}: a code block is not closed"
    for number, line in enumerate(prose, 1):
        if heading := re.match(r"^#+ (.*)$", line):
            page.anchors.add(slug(heading[1]))
        if line.startswith("|"):
            page.table_rows.append(Piece(number, line))
        page.links += [Piece(number, link) for link in _LINK.findall(_SPAN.sub("", line))]
    page.spans = _spans(prose)
    return page


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip())
    return re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")


def _spans(prose: list[str]) -> list[Piece]:
    """Code spans; one may go on in the next line of its paragraph."""
    found, start = [], 0
    while start < len(prose):
        stop = start + 1
        while stop < len(prose) and prose[start].strip() and prose[stop].strip() and not prose[stop].startswith("|"):
            stop += 1
        paragraph = "\n".join(prose[start:stop])
        for match in _SPAN.finditer(paragraph):
            line = start + 1 + paragraph[: match.start()].count("\n")
            found.append(Piece(line, " ".join(match[2].split())))
        start = stop
    return found


def _command_lines(block: Piece) -> list[Piece]:
    found: list[Piece] = []
    lines = block.text.splitlines()
    number = 0
    while number < len(lines):
        first, text = number, _PROMPT.sub("", lines[number]).strip()
        while text.endswith("\\") and number + 1 < len(lines):
            number += 1
            text = text[:-1].rstrip() + " " + lines[number].strip()
        if _is_command(text):
            found.append(Piece(block.line + first, text))
        number += 1
    return found


def _is_command(text: str) -> bool:
    return (
        re.match(r"(?:[A-Z_]+=\S+ )*(?:\./launch\.sh|(?:\.venv/bin/)?python3? (?:-m megakd|tools/))", text) is not None
    )
