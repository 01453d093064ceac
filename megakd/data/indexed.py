"""Megatron-core's `.bin/.idx` token files read as one stream of tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from numpy.typing import NDArray

from megakd.common.errors import UserError
from megakd.data.token_writer import HEADER, MAGIC, VERSION

MASK_ENDING = ".mask"
"""Of the pair beside a pair of examples: one uint8 per token."""
WEIGHT_ENDING = ".weight"
"""Of the pair beside those two where tokens have weights: one float32 per token."""
_REWRITE = "Write the pair again with tools/preprocess_data.py."


class IndexedStream:
    """The documents of a `.bin/.idx` pair, memory-mapped, as one stream in file order of a value per token.

    `key` is the configuration key that messages name. Raises UserError where a file is missing, is not of
    megatron-core's format or of `types`, or is cut short.
    """

    types: ClassVar[tuple[DType, ...]]

    def __init__(self, prefix: str | Path, *, key: str = "data.train") -> None:
        self.prefix = str(prefix)
        self._key = key
        self._check()
        self._dataset: Any = IndexedDataset(self.prefix, mmap=True)
        self._dtype: Any = self._dataset.index.dtype
        self._itemsize = int(np.dtype(self._dtype).itemsize)
        self.num_documents = len(self._dataset.document_indices) - 1
        self._starts = _DocumentStarts(self._dataset, self._itemsize)
        self.num_tokens = self._end() // self._itemsize
        size = Path(f"{self.prefix}.bin").stat().st_size
        if size != self._end():
            raise UserError(
                f"{key}: {self.prefix}.bin is {size} bytes but {self.prefix}.idx speaks of {self._end()}; "
                f"one of them is damaged or of another data set. {_REWRITE}"
            )

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Values start..stop of the stream, across document borders, as they are in the file."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        if start == stop:
            return np.empty(0, dtype=self._dtype)
        # Documents lie one after another in the file, so a slice of the stream is a slice of the file.
        values: NDArray[Any] = self._dataset.bin_reader.read(self._dtype, stop - start, start * self._itemsize)
        return values

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Where documents begin among the tokens start..stop, in ascending order."""
        first, last = (bisect_left(self._starts, place) for place in (start, stop))
        # Documents without tokens begin where the next one does.
        return np.unique(np.array([self._starts[i] for i in range(first, last)], dtype=np.int64))

    def document_lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, [documents]."""
        lengths = np.array(self._dataset.index.sequence_lengths, dtype=np.int64)
        documents = np.array(self._dataset.document_indices, dtype=np.int64)
        if len(documents) == len(lengths) + 1:
            return lengths
        ends = np.concatenate([[0], np.cumsum(lengths)])
        return np.diff(ends[documents])

    def _end(self) -> int:
        index = self._dataset.index
        return int(index.sequence_pointers[-1]) + int(index.sequence_lengths[-1]) * self._itemsize

    def _check(self) -> None:
        bin_path, idx_path = Path(f"{self.prefix}.bin"), Path(f"{self.prefix}.idx")
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise UserError(f"{self._key} is {self.prefix}; {path} does not exist. {self._missing_remedy()}")
        with idx_path.open("rb") as file:
            head = file.read(HEADER.size)
        magic, version, code, sequences, documents = HEADER.unpack(head.ljust(HEADER.size, b"\x00"))
        codes = {dtype.value for dtype in self.types}
        if magic != MAGIC or version != VERSION or code not in codes:
            kinds = " or ".join(dtype.name for dtype in self.types)
            raise UserError(
                f"{self._key}: {idx_path} is no index of megatron-core's token files that hold {kinds}. {_REWRITE}"
            )
        expected = HEADER.size + 12 * sequences + 8 * documents
        size = idx_path.stat().st_size
        if size != expected:
            raise UserError(
                f"{self._key}: {idx_path} is {size} bytes but its header says {expected}: "
                f"it is cut short or damaged. {_REWRITE}"
            )
        if bin_path.stat().st_size == 0 or sequences == 0:
            raise UserError(f"{self._key}: {bin_path} holds no tokens. {_REWRITE}")

    def _missing_remedy(self) -> str:
        stem, dot, ending = self.prefix.rpartition(".")
        if dot and ending in ("bin", "idx", "json") and Path(f"{stem}.idx").is_file():
            return f"Give the path without its ending: {stem}."
        return "Write the pair with tools/preprocess_data.py --output-prefix PREFIX, and give that PREFIX."


class TokenStream(IndexedStream):
    """Token ids, or what a mask says of tokens."""

    types = (DType.uint8, DType.uint16, DType.int32, DType.int64)

    def slice(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens start..stop of the stream, across document borders, as a new int64 array [stop - start]."""
        return np.array(self.read(start, stop), dtype=np.int64)


class WeightStream(IndexedStream):
    """Weights of tokens, beside their ids."""

    types = (DType.float32,)

    def slice(self, start: int, stop: int) -> NDArray[np.float32]:
        """Weights start..stop of the stream, across document borders, as a new float32 array [stop - start]."""
        return np.array(self.read(start, stop), dtype=np.float32)


class _DocumentStarts(Sequence[int]):
    """First token of each document, looked up in the mapped index, which need not fit in memory."""

    def __init__(self, dataset: Any, itemsize: int) -> None:
        self._documents, self._pointers = dataset.document_indices, dataset.index.sequence_pointers
        self._itemsize = itemsize

    def __len__(self) -> int:
        return len(self._documents) - 1

    def __getitem__(self, index: Any) -> Any:
        return int(self._pointers[int(self._documents[index])]) // self._itemsize
