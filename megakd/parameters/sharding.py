"""Parameters by canonical name: how each is cut over tensor-parallel ranks and put together again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from megakd.config.architecture import GPTArchitecture
from megakd.parameters.shapes import OUTPUT_LAYER, WORD_EMBEDDINGS

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
# The local spec keeps a norm beside the linear layer that follows it; Transformer Engine's layers contain it.
_FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


class Partition(Enum):
    """How megatron-core cuts a full parameter over tensor ranks."""

    REPLICATED = "replicated"
    ROWS = "rows"
    COLUMNS = "columns"
    GATED_ROWS = "gated_rows"
    """The full parameter is [gate; up]; every rank holds [its rows of gate; its rows of up]."""
    VOCAB = "vocab"
    """Rows, the vocabulary padded with zero rows."""


def canonical_name(module_name: str, layer_offset: int) -> str:
    """Name a parameter of a pipeline stage independently of layer spec, wrappers and stage.

    Args:
        module_name: as `named_parameters()` gives it, with the layer's number within the stage.
        layer_offset: layers in the stages before this one.
    """
    while module_name.startswith("module."):
        module_name = module_name[len("module.") :]
    match = _LAYER.match(module_name)
    if match is None:
        return module_name
    rest = module_name[match.end() :]
    for separate, fused in _FUSED_NORMS.items():
        if rest.startswith(separate):
            rest = fused + rest[len(separate) :]
    rest = rest.replace(".local_experts.", ".", 1)
    return f"decoder.layers.{int(match[1]) + layer_offset}.{rest}"


def in_layer(name: str, layer: int) -> str:
    """The canonical name of the same parameter in another layer."""
    return _LAYER.sub(f"decoder.layers.{layer}.", name)


def layer_of(name: str) -> int | None:
    """Global layer number in a canonical name, None for a parameter outside the layers."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def expert_of(name: str) -> int | None:
    """Number of the expert in a canonical name, None for a parameter outside the experts."""
    match = _EXPERT.search(name)
    return int(match[1]) if match else None


def shard_of(name: str, architecture: GPTArchitecture) -> Partition:
    """How the parameter of this canonical name is cut over tensor ranks."""
    if name in (WORD_EMBEDDINGS, OUTPUT_LAYER):
        return Partition.VOCAB
    if name.endswith(("linear_qkv.weight", "linear_qkv.bias")):
        return Partition.ROWS
    if name.endswith(("linear_fc1.weight", "linear_fc1.bias")):
        return Partition.GATED_ROWS if architecture.activation == "swiglu" else Partition.ROWS
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return Partition.COLUMNS
    return Partition.REPLICATED


def even_slice(size: int, tp_rank: int, tp_size: int) -> slice:
    """A rank's part of a dimension of `size`.

    Raises:
        ValueError: the dimension does not divide by the tensor-parallel size.
    """
    if size % tp_size:
        raise ValueError(f"a dimension of {size} does not divide over {tp_size} tensor-parallel ranks")
    each = size // tp_size
    return slice(tp_rank * each, (tp_rank + 1) * each)


Block = tuple[slice, ...]
"""A block of a parameter: rows, or rows and columns, each with its bounds."""


def shard_blocks(partition: Partition, shape: Sequence[int], tp_rank: int, tp_size: int) -> list[Block]:
    """The blocks of a full (padded) parameter that make a tensor rank's shard, one after the other along the rows.

    Raises:
        ValueError: the parameter does not divide by the tensor-parallel size.
    """
    rows = slice(0, shape[0])
    if partition is Partition.REPLICATED or tp_size == 1:
        return [(rows,)]
    if partition is Partition.COLUMNS:
        return [(rows, even_slice(shape[1], tp_rank, tp_size))]
    if partition is Partition.GATED_ROWS:
        half = shape[0] // 2
        gate = even_slice(half, tp_rank, tp_size)
        return [(gate,), (slice(half + gate.start, half + gate.stop),)]
    return [(even_slice(shape[0], tp_rank, tp_size),)]


def take_shard(full: Tensor, partition: Partition, tp_rank: int, tp_size: int) -> Tensor:
    """The shard of a full (padded) parameter that a tensor rank holds; a view where the shard is one block.

    Raises:
        ValueError: the parameter does not divide by the tensor-parallel size.
    """
    return join_blocks([full[block] for block in shard_blocks(partition, full.shape, tp_rank, tp_size)])


def join_blocks(blocks: Sequence[Tensor]) -> Tensor:
    """A shard from its blocks."""
    return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks))


def join_shards(shards: Sequence[Tensor], partition: Partition) -> Tensor:
    """The full (padded) parameter from the shards of all tensor ranks, in rank order."""
    if partition is Partition.REPLICATED or len(shards) == 1:
        return shards[0]
    if partition is Partition.COLUMNS:
        return torch.cat(list(shards), dim=1)
    if partition is Partition.GATED_ROWS:
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat([*gates, *ups])
    return torch.cat(list(shards))


def joined_shape(shard_shape: Sequence[int], partition: Partition, tp_size: int) -> tuple[int, ...]:
    """Shape that `join_shards` gives for `tp_size` shards of this shape."""
    shape = list(shard_shape)
    if partition is not Partition.REPLICATED:
        shape[1 if partition is Partition.COLUMNS else 0] *= tp_size
    return tuple(shape)
