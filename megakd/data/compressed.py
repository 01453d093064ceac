"""Files read as bytes of UTF-8 text: unpacked where they are gzip or zstd, whatever their ending, and decoded."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

Packing = Literal["plain", "gzip", "zstd"]
# UTF-16 and UTF-32 are read where a byte order mark says which. The longer marks come first: UTF-32's little-endian one
# begins with UTF-16's.
BYTE_ORDER_MARKS: dict[bytes, str] = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
UTF8 = "utf-8"
PACKED_ENDINGS = (".gz", ".zst")
BUFFER = 1 << 18
# What the three readers raise on a file that is cut short or altered: pyarrow raises a bare OSError for zstd.
DAMAGE = (EOFError, zlib.error, OSError)


def inner_suffix(path: Path) -> str:
    """Return the ending before .gz or .zst, in lower case: ".jsonl" of "a.JSONL.gz"."""
    suffix = path.suffix.lower()
    return path.with_suffix("").suffix.lower() if suffix in PACKED_ENDINGS else suffix


def packing_of(head: bytes) -> Packing:
    """Return how a file that begins with `head` (at least 4 bytes where it has them) is packed."""
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    # A frame of data, or one to be skipped, as parallel compressors write before the first.
    is_zstd = head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5)
    return "zstd" if is_zstd else "plain"


@contextmanager
def open_bytes(
    path: Path, packing: Packing = "plain", encoding: str = UTF8
) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """Open a file for reading; yields the stream, unpacked and in UTF-8, and what tells how much of the file was read.

    Files of several gzip members or zstd frames are read to their end. What the encoding cannot decode becomes bytes
    that are no UTF-8. Raises OSError where the file cannot be opened; reading raises one of `DAMAGE`.
    """
    with path.open("rb", buffering=BUFFER) as raw:
        unpacked: Any = raw
        if packing == "gzip":
            unpacked = gzip.GzipFile(fileobj=raw)
        elif packing == "zstd":
            import pyarrow

            # A closing BufferedReader closes what it reads from, all the way down.
            unpacked = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
        if encoding != UTF8:
            unpacked = _Transcoded(unpacked, encoding)
        if unpacked is raw:
            yield raw, raw.tell
            return
        with io.BufferedReader(unpacked, BUFFER) as stream:
            yield stream, lambda: 0 if raw.closed else raw.tell()


class _Transcoded(io.RawIOBase):
    """A stream of UTF-16 or UTF-32 read as UTF-8; its byte order mark becomes UTF-8's."""

    def __init__(self, inner: IO[bytes], encoding: str) -> None:
        self._inner = inner
        # Halves of surrogate pairs become bytes that are no UTF-8, which readers tell by the record.
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self._ready = b""
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            data = self._inner.read(BUFFER)
            self._ended = not data
            try:
                self._ready = self._decoder.decode(data, final=self._ended).encode(UTF8, "surrogatepass")
            except UnicodeDecodeError as error:
                # What stands before it is good; nothing behind it can be trusted, and a byte that is no UTF-8 says so.
                good = error.object[: error.start].decode(error.encoding, "surrogatepass")
                self._ready, self._ended = good.encode(UTF8, "surrogatepass") + b"\xff", True
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
        super().close()
