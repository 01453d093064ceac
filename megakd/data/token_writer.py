"""Megatron-core's `.bin/.idx` format written piece by piece: memory does not grow with the documents."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType
from numpy.typing import NDArray

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, entries of the document index
BLOCK = 1 << 18  # documents, or tokens, that are written at a time
WEIGHT_DTYPE: np.dtype[Any] = np.dtype("<f4")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The integers that megatron-core stores ids of such a vocabulary in: uint16 or int32."""
    dtype: np.dtype[Any] = np.dtype(DType.optimal_dtype(vocab_size))
    return dtype


class TokenWriter:
    """Appends documents to `<prefix>.bin`, their lengths to `<prefix>.lengths`; `write_index` makes `<prefix>.idx`.

    Opened at `documents` and `tokens` of an earlier run, whatever lies behind them is cut off; at 0 both files begin
    anew.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any], *, documents: int = 0, tokens: int = 0) -> None:
        self._prefix = prefix
        self._dtype = dtype
        self._limit = int(np.iinfo(dtype).max)
        self._files = [
            _open_at(Path(f"{prefix}.bin"), tokens * dtype.itemsize),
            _open_at(lengths_path(prefix), documents * 4),
        ]

    def add(self, ids: NDArray[np.integer[Any]], lengths: NDArray[np.int32]) -> None:
        """Append documents that lie one after another in `ids` [sum of lengths]; raises OverflowError on a large id."""
        if len(ids) and int(ids.max()) > self._limit:
            raise OverflowError(f"token id {int(ids.max())} is over {self._limit}, the most {self._dtype} holds")
        for file, array in zip(self._files, (ids.astype(self._dtype, copy=False), lengths), strict=True):
            file.write(np.ascontiguousarray(array).data)

    def files(self) -> list[Any]:
        """The open files, for whoever makes them durable."""
        return self._files

    def finish(self) -> None:
        """Close the files and write the index."""
        self.close()
        write_index(self._prefix, self._dtype)

    def close(self) -> None:
        """Close the files; harmless when repeated."""
        for file in self._files:
            file.close()


def lengths_path(prefix: Path) -> Path:
    """The documents' lengths as bare int32, from which the index is made."""
    return Path(f"{prefix}.lengths")


class WeightWriter:
    """Appends weights of tokens to `<prefix>.bin` as float32, from the first one that is not 1 on.

    Before it there is no file, and ones are written for the tokens so far when it comes. Opened at `tokens` of an
    earlier run, which had come to such a weight or not; whatever lies behind them is cut off.
    """

    def __init__(self, prefix: Path, *, tokens: int = 0, has_weights: bool = False) -> None:
        self._prefix = prefix
        self._path = Path(f"{prefix}.bin")
        self._tokens = tokens
        self._file: Any = None
        if has_weights:
            self._file = _open_at(self._path, tokens * WEIGHT_DTYPE.itemsize)
        else:
            self._path.unlink(missing_ok=True)  # begun behind the place that the earlier run is gone on from

    @property
    def has_weights(self) -> bool:
        """Whether there was a weight that is not 1."""
        return self._file is not None

    def add(self, weights: NDArray[np.float32] | None, count: int) -> None:
        """Append the weights [count] of so many tokens; None where all are 1."""
        if weights is not None and self._file is None:
            self._file = self._path.open("wb")
            self._write_ones(self._tokens)
        if weights is not None:
            assert len(weights) == count, (len(weights), count)
            self._file.write(np.ascontiguousarray(weights, dtype=WEIGHT_DTYPE).data)
        elif self._file is not None:
            self._write_ones(count)
        self._tokens += count

    def files(self) -> list[Any]:
        """The open files, for whoever makes them durable."""
        return [self._file] if self._file is not None else []

    def finish(self, lengths: Path) -> None:
        """Close the file and write the index of the documents, from their lengths as `TokenWriter` leaves them."""
        self.close()
        if self.has_weights:
            write_index(self._prefix, WEIGHT_DTYPE, lengths=lengths)

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        if self._file is not None:
            self._file.close()

    def _write_ones(self, count: int) -> None:
        for start in range(0, count, BLOCK):
            self._file.write(np.ones(min(BLOCK, count - start), dtype=WEIGHT_DTYPE).data)


def write_index(prefix: Path, dtype: np.dtype[Any], *, lengths: Path | None = None) -> None:
    """Write `<prefix>.idx` from `<prefix>.lengths` or another file like it, every document one sequence."""
    path = lengths_path(prefix) if lengths is None else lengths
    count = path.stat().st_size // 4
    sizes = np.memmap(path, dtype="<i4", mode="r") if count else np.empty(0, dtype="<i4")
    blocks = range(0, count, BLOCK)
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, DType.code_from_dtype(dtype.type), count, count + 1))
        for start in blocks:
            file.write(sizes[start : start + BLOCK].tobytes())
        offset = 0
        for start in blocks:
            ends = offset + np.cumsum(sizes[start : start + BLOCK], dtype="<i8") * dtype.itemsize
            file.write(np.concatenate([np.array([offset], dtype="<i8"), ends[:-1]]).tobytes())
            offset = int(ends[-1])
        for start in range(0, count + 1, BLOCK):
            file.write(np.arange(start, min(start + BLOCK, count + 1), dtype="<i8").tobytes())


def _open_at(path: Path, size: int) -> Any:
    if size == 0:
        return path.open("wb")
    file = path.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file
