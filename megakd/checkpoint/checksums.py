"""SHA256SUMS of a checkpoint, in sha256sum's format: what the folder must hold, to the byte."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megakd.common.durable import write_durably
from megakd.common.piecewise_file import PiecewiseFile

if TYPE_CHECKING:
    from typing_extensions import Buffer

CHECKSUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9._-]+)")
_BLOCK = 1 << 22


class Damage(Exception):
    """A checkpoint is not what was written; the text names the file and what is wrong with it."""


class HashingFile(PiecewiseFile):
    """A new file that keeps the SHA-256 of what is written to it, from its beginning to its end."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._hash = hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, data: Buffer) -> int:
        """Write all of it; `failure` keeps an error that torch, which calls this, tells in its own words."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        try:
            return super().write(view)
        except OSError as error:
            self.failure = error
            raise

    @property
    def digest(self) -> str:
        """In hex."""
        return self._hash.hexdigest()


def file_digest(path: Path) -> str:
    """A file's SHA-256, in hex; raises OSError."""
    state = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return state.hexdigest()


def write_checksums(folder: Path, digests: Mapping[str, str]) -> None:
    """Write SHA256SUMS for files by name; raises OSError."""
    lines = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    write_durably(folder / CHECKSUMS, lines.encode("ascii"))


def read_checksums(folder: Path) -> dict[str, str]:
    """Digests by name of the files that a checkpoint consists of, which are all there and no others.

    Raises:
        Damage: SHA256SUMS is missing or not as it was written, or the folder has other files.
    """
    try:
        text = (folder / CHECKSUMS).read_bytes().decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise Damage(f"{CHECKSUMS} cannot be read ({reason})") from error
    matches = [_LINE.fullmatch(line) for line in text.removesuffix("\n").split("\n")]
    digests = {match[2]: match[1] for match in matches if match is not None}
    if not text.endswith("\n") or len(digests) != len(matches):
        raise Damage(f"{CHECKSUMS} is not as it was written")
    found = {path.name for path in folder.iterdir()} - {CHECKSUMS}
    for name in sorted(digests.keys() ^ found):
        raise Damage(f"{name} is missing" if name in digests else f"{name} is not in {CHECKSUMS}")
    return digests


def check_files(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Hold a share of a checkpoint's files, every `parts`-th from `part` on, against SHA256SUMS.

    Raises:
        Damage: the first file that differs.
    """
    digests = read_checksums(folder)
    for name in sorted(digests)[part::parts]:
        try:
            digest = file_digest(folder / name)
        except OSError as error:
            raise Damage(f"{name} cannot be read ({error.strerror})") from error
        if digest != digests[name]:
            raise Damage(f"{name} is not as it was written (its SHA-256 differs)")
