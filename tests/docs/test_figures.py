"""The figures are those that tools/draw_figures.py draws, well formed, and used."""

from __future__ import annotations

import runpy
from xml.etree import ElementTree

from tests.docs.pages import ROOT, read_page

FIGURES = runpy.run_path(str(ROOT / "tools" / "draw_figures.py"))["FIGURES"]
FOLDER = ROOT / "docs" / "figures"


def test_the_files_are_what_the_tool_draws() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(FIGURES)
    for name, draw in FIGURES.items():
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert text == draw().render(), f"run tools/draw_figures.py: {name} has changed"
        ElementTree.fromstring(text)


def test_every_figure_is_shown_on_a_page() -> None:
    shown = {link.text for path in (ROOT / "docs").glob("*.md") for link in read_page(path).links}
    assert [name for name in FIGURES if f"figures/{name}" not in shown] == []
