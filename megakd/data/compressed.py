"""Files read as bytes, unpacked on the way where their ending is .gz or .zst."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

COMPRESSED_ENDINGS = (".gz", ".zst")
BUFFER = 1 << 18
# What the three readers raise on a file that is cut short or altered: pyarrow raises a bare OSError for zstd.
DAMAGE = (EOFError, zlib.error, OSError)


def inner_suffix(path: Path) -> str:
    """The ending that tells the format, in lower case: ".jsonl" of "a.JSONL.gz"."""
    suffix = path.suffix.lower()
    return path.with_suffix("").suffix.lower() if suffix in COMPRESSED_ENDINGS else suffix


@contextmanager
def open_bytes(path: Path) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """Open a file for reading; yields the unpacked stream and what tells how many bytes of the file itself were read.

    Files of several gzip members or zstd frames are read to their end. Raises OSError where the file cannot be
    opened; reading raises one of `DAMAGE`.
    """
    with path.open("rb", buffering=BUFFER) as raw:
        suffix = path.suffix.lower()
        if suffix == ".gz":
            unpacked: Any = gzip.GzipFile(fileobj=raw)
        elif suffix == ".zst":
            import pyarrow

            # A closing BufferedReader closes what it reads from, all the way down.
            unpacked = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
        else:
            yield raw, raw.tell
            return
        with io.BufferedReader(unpacked, BUFFER) as stream:
            yield stream, lambda: 0 if raw.closed else raw.tell()
