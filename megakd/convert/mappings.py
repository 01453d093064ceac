"""The algebra between a megatron-core parameter and the Hugging Face weights it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megakd.common.errors import UserError
from megakd.config.architecture import GPTArchitecture
from megakd.convert.safetensors_folder import SafetensorsFolder
from megakd.models.sharding import Partition, even_slice

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """Which part of which model a rank reads."""

    architecture: GPTArchitecture
    tp_rank: int
    tp_size: int
    padded_vocab: int

    def of(self, size: int) -> slice:
        """This rank's part of a dimension."""
        return even_slice(size, self.tp_rank, self.tp_size)


class WeightMapping(Protocol):
    """Between one parameter and its Hugging Face weights, both ways."""

    def hf_shapes(self, shape: Shape, architecture: GPTArchitecture) -> tuple[Shape, ...]:
        """Shapes of the Hugging Face weights of a parameter whose full (padded) shape is `shape`."""

    def load(self, folder: SafetensorsFolder, hf_names: Sequence[str], partition: Partition, cut: Cut) -> Tensor:
        """Read this rank's shard, and no more of the files than it needs."""

    def export(self, full: Tensor, architecture: GPTArchitecture) -> tuple[Tensor, ...]:
        """The Hugging Face weights of a full (padded) parameter, possibly views of it."""


class Direct:
    """One weight, stored alike."""

    def hf_shapes(self, shape: Shape, architecture: GPTArchitecture) -> tuple[Shape, ...]:
        """See WeightMapping.hf_shapes."""
        return (shape,)

    def load(self, folder: SafetensorsFolder, hf_names: Sequence[str], partition: Partition, cut: Cut) -> Tensor:
        """See WeightMapping.load."""
        (name,) = hf_names
        if partition is Partition.REPLICATED:
            return folder.read(name)
        shape = folder.shape(name)
        if partition is Partition.COLUMNS:
            return folder.read(name, (slice(None), cut.of(shape[1])))
        assert partition is Partition.ROWS
        return folder.read(name, (cut.of(shape[0]),))

    def export(self, full: Tensor, architecture: GPTArchitecture) -> tuple[Tensor, ...]:
        """See WeightMapping.export."""
        return (full,)


class Vocabulary:
    """One row per token, with zero rows after the last token."""

    def hf_shapes(self, shape: Shape, architecture: GPTArchitecture) -> tuple[Shape, ...]:
        """See WeightMapping.hf_shapes."""
        return ((architecture.vocab_size, *shape[1:]),)

    def load(self, folder: SafetensorsFolder, hf_names: Sequence[str], partition: Partition, cut: Cut) -> Tensor:
        """See WeightMapping.load."""
        return load_vocabulary(folder, hf_names[0], cut.of(cut.padded_vocab))

    def export(self, full: Tensor, architecture: GPTArchitecture) -> tuple[Tensor, ...]:
        """See WeightMapping.export."""
        return (full[: architecture.vocab_size],)


def load_vocabulary(folder: SafetensorsFolder, name: str, rows: slice) -> Tensor:
    """Rows of a weight [v, h]; those beyond its end are zero."""
    vocab_size = folder.shape(name)[0]
    start, stop = (min(bound, vocab_size) for bound in (rows.start, rows.stop))
    part = folder.read(name, (slice(start, stop),))
    missing = (rows.stop - rows.start) - part.shape[0]
    return torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part


class GroupedQKV:
    """q, k and v [rows, ...], stored by query group: its q heads, its k head, its v head."""

    def hf_shapes(self, shape: Shape, architecture: GPTArchitecture) -> tuple[Shape, ...]:
        """See WeightMapping.hf_shapes."""
        query, key = self._rows(architecture)
        return (query, *shape[1:]), (key, *shape[1:]), (key, *shape[1:])

    def load(self, folder: SafetensorsFolder, hf_names: Sequence[str], partition: Partition, cut: Cut) -> Tensor:
        """See WeightMapping.load.

        Raises:
            UserError: the query groups do not divide over the tensor ranks.
        """
        groups = cut.architecture.num_query_groups
        if groups % cut.tp_size:
            raise UserError(
                f"parallel.tensor_model_parallel_size is {cut.tp_size}; it must divide the model's num_query_groups "
                f"({groups})."
            )
        # A block of consecutive groups is a block of consecutive rows in q, in k and in v.
        query, key = self._rows(cut.architecture)
        parts = [folder.read(name, (cut.of(rows),)) for name, rows in zip(hf_names, (query, key, key), strict=True)]
        local = groups // cut.tp_size
        blocks = [part.reshape(local, -1, cut.architecture.kv_channels, *part.shape[1:]) for part in parts]
        joined = torch.cat(blocks, dim=1)
        return joined.reshape(-1, *joined.shape[3:])

    def export(self, full: Tensor, architecture: GPTArchitecture) -> tuple[Tensor, ...]:
        """See WeightMapping.export."""
        heads = architecture.num_attention_heads // architecture.num_query_groups
        blocks = full.reshape(architecture.num_query_groups, heads + 2, architecture.kv_channels, *full.shape[1:])
        return tuple(part.flatten(0, 2) for part in torch.split(blocks, [heads, 1, 1], dim=1))

    @staticmethod
    def _rows(architecture: GPTArchitecture) -> tuple[int, int]:
        each = architecture.kv_channels
        return architecture.num_attention_heads * each, architecture.num_query_groups * each


class GatedMLP:
    """Gate and up projections [f, ...], stored as [gate; up]."""

    def hf_shapes(self, shape: Shape, architecture: GPTArchitecture) -> tuple[Shape, ...]:
        """See WeightMapping.hf_shapes."""
        half = (shape[0] // 2, *shape[1:])
        return half, half

    def load(self, folder: SafetensorsFolder, hf_names: Sequence[str], partition: Partition, cut: Cut) -> Tensor:
        """See WeightMapping.load."""
        rows = cut.of(cut.architecture.ffn_hidden_size)
        return torch.cat([folder.read(name, (rows,)) for name in hf_names])

    def export(self, full: Tensor, architecture: GPTArchitecture) -> tuple[Tensor, ...]:
        """See WeightMapping.export."""
        return full.chunk(2)
