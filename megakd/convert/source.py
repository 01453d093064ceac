"""Where a model's weights come from, whichever the format: what its readers have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megakd.common.errors import UserError
from megakd.config.architecture import GPTArchitecture
from megakd.parameters.shapes import OUTPUT_LAYER, WORD_EMBEDDINGS
from megakd.parameters.sharding import Block, in_layer, layer_of

# Rows of a weight that are read at a time.
_ROWS = 1024


class WeightSource(Protocol):
    """A model on disk, read parameter by parameter, block by block."""

    path: Path
    architecture: GPTArchitecture

    def read(self, name: str, block: Block) -> Tensor:
        """A block of the full parameter of this canonical name; rows of the vocabulary beyond its end are zero.

        Raises:
            UserError: it is not there, or its file is damaged.
        """

    def dtype(self, name: str) -> torch.dtype:
        """Type a parameter is stored in."""

    def origin(self, name: str) -> str:
        """What a parameter is stored as, for messages."""

    def check(self, architecture: GPTArchitecture, layer_map: Sequence[int] | None = None) -> None:
        """Check that every weight of a model is there, in its shape, and no other.

        Headers are all that is read, but for the head that may stand beside tied embeddings: it must be equal to them.

        Args:
            architecture: the model to fill.
            layer_map: the source's layer for each of its layers; None for the same.

        Raises:
            UserError: the first weight that is missing, misshapen, quantized or not known, or a head that is not the
                embedding.
        """


def row_blocks(shape: Sequence[int]) -> Iterator[Block]:
    """A weight in blocks of some thousand rows."""
    for start in range(0, shape[0], _ROWS):
        yield (slice(start, min(start + _ROWS, shape[0])),)


def stored_name(name: str, architecture: GPTArchitecture) -> str:
    """The parameter that a model on disk holds in the place of `name`: tied, the embedding for the head."""
    tied = architecture.share_embeddings_and_output_weights
    return WORD_EMBEDDINGS if tied and name == OUTPUT_LAYER else name


def source_name(name: str, layer_map: Sequence[int] | None) -> str:
    """The source's name of a parameter of a model that keeps some of its layers (depth pruning)."""
    layer = layer_of(name)
    return name if layer is None or layer_map is None else in_layer(name, layer_map[layer])


def most_used(nbytes: Iterable[tuple[torch.dtype, int]]) -> torch.dtype:
    """The type that most of a model's bytes are stored in."""
    total: Counter[torch.dtype] = Counter()
    for dtype, count in nbytes:
        total[dtype] += count
    return total.most_common(1)[0][0]


def dtype_word(dtype: torch.dtype) -> str:
    """torch's name of a type, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


def to_dtype(part: Tensor, dtype: torch.dtype, origin: str) -> Tensor:
    """A block of a weight in another type; what is infinite or NaN stays so.

    Args:
        origin: the weight's name, for the message.

    Raises:
        UserError: a value is beyond the type's largest.
    """
    if part.dtype is dtype:
        return part
    converted = part.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(part.dtype).max and not converted.isfinite().all():
        lost = part[part.isfinite() & ~converted.isfinite()]
        if lost.numel():
            raise UserError(
                f"{origin} holds {float(lost.abs().max()):.4g}, and {dtype_word(dtype)} ends at "
                f"{torch.finfo(dtype).max:.4g}. Use --dtype bf16 or fp32."
            )
    return converted


def show_shape(shape: Sequence[int]) -> str:
    """A shape as messages spell it."""
    return "[" + ", ".join(str(size) for size in shape) + "]"
