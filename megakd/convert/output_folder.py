"""A folder that appears under its name only when all of it is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from megakd.common.errors import UserError
from megakd.common.logging import log
from megakd.convert.earlier_output import OutputKind, check_apart, real_path
from megakd.convert.work_folder import WorkFolder

# For each weight, piece and object: its header, its place in the index and what it is rounded up to.
_ENTRY_BYTES = 4096
_MARGIN_BYTES = 2**20

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
    """Written beside its final place, in `path`, which no other writer has meanwhile.

    Raises:
        UserError: `out` exists and is not to be replaced (see `OutputKind.check`), is not apart from `sources`, or
            another writer is at work on it.
        OSError: nothing can be written there.
    """

    def __init__(self, out: str | Path, kind: OutputKind, *sources: str | Path | None, overwrite: bool) -> None:
        self.out = out
        self._kind, self._overwrite = kind, overwrite
        check_apart(out, *sources)
        kind.check(out, overwrite=overwrite)
        self._work = WorkFolder(real_path(out))
        self.path = self._work.new
        try:
            # Once more: it may have been brought back, or written by a writer that has ended since.
            kind.check(out, overwrite=overwrite)
        except BaseException:
            self.discard()
            raise

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def publish(self) -> None:
        """Give the folder its name; one that had it before goes when the new one is in its place.

        Raises:
            UserError: what must not be replaced has appeared in its place.
        """
        for file in (self.path, *self.path.rglob("*")):
            _flush(file)
        self._kind.check(self.out, overwrite=self._overwrite)
        final = self._work.final
        if final.exists():
            final.rename(self._work.old)
        self.path.rename(final)
        with suppress(OSError):
            # It is in its place: an error now would say that it is not.
            _flush(final.parent)
        self._work.remove()

    def discard(self) -> None:
        """Remove what has been written, unless it is published."""
        self._work.remove()

    def check_space(self, nbytes: int, entries: int, beside: Path) -> None:
        """Refuse to begin what does not fit the disk.

        Args:
            nbytes: size of all weights.
            entries: number of weights, pieces and objects.
            beside: folder whose configuration and tokenizer are copied.

        Raises:
            UserError: less than that is free.
        """
        copied = _present(beside, ("config.json", "generation_config.json", *TOKENIZER_FILES))
        total = nbytes + entries * _ENTRY_BYTES + _MARGIN_BYTES + sum(file.stat().st_size for file in copied)
        free = shutil.disk_usage(self.path).free
        if free < total:
            raise UserError(
                f"{self.out} needs {_show_size(total)} and {self._work.final.parent} has {_show_size(free)} free. Make "
                "room, or name another disk."
            )

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file."""
        (self.path / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def copy_tokenizer(self, source: Path) -> None:
        """Copy a folder's tokenizer files; a warning where it has none."""
        if not copy_tokenizer_files(source, self.path):
            log.warning(f"{source} has no tokenizer files; {self.out} is written without.")


def copy_tokenizer_files(source: Path, target: Path) -> bool:
    """Copy a folder's tokenizer files to another; whether there are any."""
    present = _present(source, TOKENIZER_FILES)
    for file in present:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    return bool(present)


@contextmanager
def write_errors_told(out: str | Path) -> Iterator[None]:
    """Say in one line that `out` cannot be written, and why.

    Raises:
        UserError: in the place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{out} could not be written: {error.strerror or error}. Make room, or name a path that can be written."
        ) from error


def _present(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return [file for pattern in patterns for file in sorted(folder.glob(pattern)) if file.is_file()]


def _show_size(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:,.1f} MiB"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
