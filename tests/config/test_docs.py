"""docs/configuration.md lists every key there is, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from pydantic import BaseModel

from megakd.config.schema import Config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
# A section of four numbers, described in one row.
WHOLE = {"student.architecture.rope_scaling"}


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        inner = [t for t in (field.annotation, *get_args(field.annotation)) if isinstance(t, type)]
        sections = [t for t in inner if issubclass(t, BaseModel)]
        if prefix:
            yield key
        if sections and key not in WHOLE:
            yield from keys(sections[0], f"{key}.")


def test_every_key_is_described_and_every_described_key_exists() -> None:
    described = re.findall(r"^\| `([a-z_.0-9]+)` \|", PAGE.read_text(), flags=re.MULTILINE)
    assert len(described) == len(set(described))
    assert set(described) == set(keys(Config))
