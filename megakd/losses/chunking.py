"""How many rows of logits exist at one time."""

from __future__ import annotations

import torch

# On CPU the products of 384 rows of a 32k vocabulary run within a few percent of whole ones, those of 256 do not; a
# GPU needs a thousand.
DEFAULT_CHUNK_MIB = {"cpu": 96, "cuda": 1024}
ROW_MULTIPLE = 128
# Elementwise work goes through a chunk in blocks that stay in a CPU core's cache (L2, 2 MiB on a server) with all the
# buffers it touches; on GPU only launches count.
BLOCK_BYTES = {"cpu": 9 << 18, "cuda": 256 << 20}


def chunk_rows(
    num_rows: int,
    local_vocab: int,
    *,
    device_type: str = "cpu",
    chunk_mib: int | None = None,
    element_size: int = 4,
    models: int = 2,
) -> int:
    """Rows per chunk such that a buffer [rows, local_vocab] per model fits `chunk_mib` MiB (96 on CPU, 1024 on GPU).

    A multiple of 128, and not below 128 even where that exceeds the budget; `num_rows` where that is less.
    `local_vocab` is the vocabulary of one tensor rank, v/tp; `models` is 1 where only the student has logits. Raises
    ValueError for a budget below 1.
    """
    if chunk_mib is None:
        chunk_mib = DEFAULT_CHUNK_MIB.get(device_type, DEFAULT_CHUNK_MIB["cuda"])
    if not isinstance(chunk_mib, int) or chunk_mib < 1:
        raise ValueError(
            f"chunk_mib is {chunk_mib}; it must be a whole number of at least 1. Leave it out for the device's default."
        )
    rows = (chunk_mib << 20) // (models * element_size * local_vocab)
    rows = max(ROW_MULTIPLE, rows - rows % ROW_MULTIPLE)
    return min(num_rows, rows)


def block_rows(rows: int, width: int, buffers: int, device: torch.device, element_size: int) -> int:
    """Rows of a chunk [rows, width] that one pass over `buffers` of that width treats together, at least 1."""
    size = BLOCK_BYTES.get(device.type, BLOCK_BYTES["cuda"])
    if device.type == "cpu":
        size *= torch.get_num_threads()
    return max(1, min(rows, size // (element_size * width * buffers)))
