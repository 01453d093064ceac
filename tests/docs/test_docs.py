"""Every key, command, option, file and link that the documentation names is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.checks import find_faults
from tests.docs.pages import ROOT, read_page

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.md")])
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
# Its tables' first cells are options of other programs.
MIGRATING = ROOT / "docs" / "migrating.md"


@pytest.mark.parametrize("path", [*PAGES, *CONFIGS], ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_names_is_there(path: Path) -> None:
    assert find_faults(read_page(path), foreign_first_cells=path == MIGRATING) == []


def test_the_pages_are_found() -> None:
    found = {str(path.relative_to(ROOT)) for path in PAGES}
    assert {"README.md", "docs/configuration.md", "docs/migrating.md", "configs/README.md"} <= found
    commands = [command for path in [*PAGES, *CONFIGS] for command in read_page(path).commands()]
    assert len(commands) > 40
    assert sum(block.language == "yaml" for path in PAGES for block in read_page(path).blocks) >= 4
