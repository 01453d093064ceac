"""A folder that appears under its name only when all of it is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megakd.common.errors import UserError
from megakd.common.logging import log

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "tekken.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    # transformers reads templates only there, so nothing else goes along.
    "additional_chat_templates/*.jinja",
)
"""Patterns of paths in a folder."""


class OutputFolder:
    """Written beside its final place, in `path`; what an interrupted writer left there is removed first."""

    def __init__(self, final: str | Path) -> None:
        self.final = Path(final).absolute()
        self.path = self.final.with_name(f".{self.final.name}.tmp")
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)

    def publish(self) -> None:
        """Give the folder its name; one that had it before goes when the new one is in its place."""
        for file in self.path.rglob("*"):
            _flush(file)
        old = self.final.with_name(f".{self.final.name}.old")
        if old.exists():
            shutil.rmtree(old)
        try:
            if self.final.exists():
                self.final.rename(old)
            self.path.rename(self.final)
        except BaseException:
            if old.exists() and not self.final.exists():
                old.rename(self.final)
            raise
        _flush(self.final.parent)
        shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Remove what has been written, unless it is published."""
        shutil.rmtree(self.path, ignore_errors=True)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file."""
        (self.path / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def copy_tokenizer(self, source: Path) -> None:
        """Copy a folder's tokenizer files; a warning where it has none."""
        present = [file for pattern in TOKENIZER_FILES for file in sorted(source.glob(pattern)) if file.is_file()]
        for file in present:
            copy = self.path / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
        if not present:
            log.warning(f"{source} has no tokenizer files; {self.final} is written without.")


def check_replaceable(out_dir: str | Path, known: set[str], *sources: str | Path | None) -> None:
    """Refuse to replace anything but what was written here before, and the folders a model comes from in any case.

    Args:
        known: names of the entries that a writer makes; safetensors files are among them in any case.

    Raises:
        UserError: `out_dir` is one of `sources`, a file, or a folder that holds anything else.
    """
    out_dir = Path(out_dir)
    if any(source is not None and Path(source).resolve() == out_dir.resolve() for source in sources):
        raise UserError(f"{out_dir} is where the model comes from; the export would replace it. Name another path.")
    if not out_dir.exists():
        return
    known = known | {file.split("/")[0] for file in TOKENIZER_FILES} | {"config.json", "generation_config.json"}
    foreign = [out_dir.name]
    if out_dir.is_dir():
        foreign = sorted(e.name for e in out_dir.iterdir() if e.name not in known and e.suffix != ".safetensors")
    if foreign:
        raise UserError(
            f"{out_dir} holds {foreign[0]}, which no export writes; the export would replace it. Name another path."
        )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
