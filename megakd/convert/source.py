"""Where a model's weights come from, whichever the format: what its readers have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megakd.config.architecture import GPTArchitecture
from megakd.parameters.sharding import OUTPUT_LAYER, WORD_EMBEDDINGS, Block, in_layer, layer_of


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
        """Check that every weight of a model is there, in its shape, and no other; reads headers only.

        Args:
            architecture: the model to fill.
            layer_map: the source's layer for each of its layers; None for the same.

        Raises:
            UserError: the first weight that is missing, misshapen, quantized or not known.
        """


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


def show_shape(shape: Sequence[int]) -> str:
    """A shape as messages spell it."""
    return "[" + ", ".join(str(size) for size in shape) + "]"
