"""Pairs of examples and their masks, written by megatron-core itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


def write_pair(prefix: str | Path, documents: list[list[int]] | list[list[float]], dtype: type = np.int32) -> None:
    """Write `<prefix>.bin/.idx`."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.array(document, dtype=dtype), [len(document)])
    builder.finalize(f"{prefix}.idx")


def write_examples(prefix: str | Path, examples: list[tuple[list[int], list[int]]]) -> str:
    """Write examples of (token ids, mask); returns the prefix."""
    write_pair(prefix, [ids for ids, _ in examples])
    write_pair(f"{prefix}.mask", [mask for _, mask in examples], np.uint8)
    return str(prefix)
