"""Megatron-core's `.bin/.idx` token files read as one stream of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from numpy.typing import NDArray

from megakd.common.errors import UserError
from megakd.data.token_writer import HEADER, MAGIC, VERSION

_REWRITE = "Write the pair again with tools/preprocess_data.py."


class TokenStream:
    """The documents of a `.bin/.idx` pair, memory-mapped, as one stream of tokens in file order.

    `key` is the configuration key that messages name. Raises UserError where a file is missing, is not of
    megatron-core's format or is cut short.
    """

    def __init__(self, prefix: str | Path, *, key: str = "data.train") -> None:
        self.prefix = str(prefix)
        self._key = key
        self._check()
        self._dataset: Any = IndexedDataset(self.prefix, mmap=True)
        self._dtype: Any = self._dataset.index.dtype
        self._itemsize = int(np.dtype(self._dtype).itemsize)
        self.num_documents = len(self._dataset.document_indices) - 1
        self.num_tokens = self._end() // self._itemsize
        size = Path(f"{self.prefix}.bin").stat().st_size
        if size != self._end():
            raise UserError(
                f"{key}: {self.prefix}.bin is {size} bytes but {self.prefix}.idx speaks of {self._end()}; "
                f"one of them is damaged or of another data set. {_REWRITE}"
            )

    def slice(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens start..stop of the stream, across document borders, as a new int64 array [stop - start]."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        if start == stop:
            return np.empty(0, dtype=np.int64)
        # Documents lie one after another in the file, so a slice of the stream is a slice of the file.
        tokens = self._dataset.bin_reader.read(self._dtype, stop - start, start * self._itemsize)
        return np.array(tokens, dtype=np.int64)

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
        codes = {dtype.value for dtype in (DType.uint8, DType.uint16, DType.int32, DType.int64)}
        if magic != MAGIC or version != VERSION or code not in codes:
            raise UserError(f"{self._key}: {idx_path} is no index of megatron-core's token files. {_REWRITE}")
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
