"""Every key that a configuration may hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from pydantic import BaseModel

from megakd.config.schema import Config

# A section of four numbers, described in one row.
WHOLE = {"student.architecture.rope_scaling"}


def config_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """`section.key` of all keys, also of sections within sections."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        inner = [t for t in (field.annotation, *get_args(field.annotation)) if isinstance(t, type)]
        sections = [t for t in inner if issubclass(t, BaseModel)]
        if prefix:
            yield key
        if sections and key not in WHOLE:
            yield from config_keys(sections[0], f"{key}.")
