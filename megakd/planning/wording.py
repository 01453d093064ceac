"""Figures and settings as text."""

from __future__ import annotations

from megakd.planning.layout import ModelLayout

GIB, MIB = 2.0**30, 2.0**20


def size_text(size: float) -> str:
    """Bytes in a unit in which there is something to read."""
    return "-" if size == 0 else f"{size / MIB:,.1f} MiB" if size < GIB else f"{size / GIB:,.2f} GiB"


def layout_text(layout: ModelLayout) -> str:
    """How many ranks of each kind a model has."""
    return f"TP {layout.tp} x PP {layout.pp} x DP {layout.dp}"


def settings_text(settings: dict[str, object]) -> str:
    """Settings as they are written on the command line."""
    return " ".join(f"{key}={'null' if value is None else str(value).lower()}" for key, value in settings.items())
