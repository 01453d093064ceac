"""docs/configuration.md lists every key there is, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from tests.config.keys import config_keys

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def test_every_key_is_described_and_every_described_key_exists() -> None:
    described = re.findall(r"^\| `([a-z_.0-9]+)` \|", PAGE.read_text(), flags=re.MULTILINE)
    assert len(described) == len(set(described))
    assert set(described) == set(config_keys())
