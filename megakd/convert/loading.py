"""Weights of a model on disk into this rank's parameters, reading only what the rank holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megakd.common.errors import UserError
from megakd.config.architecture import GPTArchitecture
from megakd.convert.hf_weights import HFWeights
from megakd.convert.megatron_weights import MegatronWeights
from megakd.convert.source import show_shape, source_name
from megakd.parameters.shapes import OUTPUT_LAYER, WORD_EMBEDDINGS, parameter_shapes
from megakd.parameters.sharding import even_slice, join_blocks, shard_blocks, shard_of
from megakd.torch_dist import checkpoint_folder


def open_weights(path: str | Path) -> HFWeights | MegatronWeights:
    """A model on disk, in Hugging Face's format or in megatron-core's.

    Raises:
        UserError: it cannot be read.
    """
    return HFWeights(path) if checkpoint_folder(path) is None else MegatronWeights(path)


@torch.no_grad()
def load_weights(
    parameters: Iterable[tuple[str, Tensor]],
    path: str | Path,
    architecture: GPTArchitecture,
    *,
    tp_rank: int,
    tp_size: int,
    divisible_by: int = 128,
    layer_map: Sequence[int] | None = None,
) -> None:
    """Fill parameters in place, one at a time, converting to their dtype and device.

    Args:
        parameters: (canonical name, this rank's shard); any subset of the model's.
        path: a Hugging Face folder, or a Megatron checkpoint with config.json beside it.
        architecture: the model's that is filled, not the folder's where layers are left out.
        divisible_by: the vocabulary is padded to a multiple of it.
        layer_map: the folder's layer for each layer of the model (depth pruning); None for the same.

    Raises:
        UserError: a weight is missing or has another shape than the parameter.
    """
    if architecture.num_query_groups % tp_size:
        raise UserError(
            f"parallel.tensor_model_parallel_size is {tp_size}; it must divide the model's num_query_groups "
            f"({architecture.num_query_groups})."
        )
    _check_layer_map(layer_map, architecture, path)
    shapes = parameter_shapes(architecture, divisible_by)
    shapes.setdefault(OUTPUT_LAYER, shapes[WORD_EMBEDDINGS])
    with open_weights(path) as source:
        for name, parameter in parameters:
            origin = source_name(name, layer_map)
            blocks = shard_blocks(shard_of(name, architecture), shapes[name], tp_rank, tp_size)
            shard = join_blocks([source.read(origin, block) for block in blocks])
            if shard.shape != parameter.shape:
                raise UserError(
                    f"{path} gives {name} the shape {show_shape(shard.shape)} on tensor rank {tp_rank} of {tp_size}; "
                    f"the model needs {show_shape(parameter.shape)} ({source.origin(origin)})."
                )
            parameter.copy_(shard)


def load_head(
    path: str | Path,
    *,
    tp_rank: int,
    tp_size: int,
    padded_vocab: int,
    dtype: torch.dtype,
    device: torch.device | str | int,
) -> Tensor:
    """Read a tensor rank's rows of a model's output head, in another model's vocabulary partition.

    Args:
        padded_vocab: rows over all ranks of the partition; rows beyond the folder's vocabulary are zero, and tokens
            beyond `padded_vocab` are left out.

    Returns:
        [padded_vocab/tp, h], the embedding's rows where the folder's model is tied.
    """
    with open_weights(path) as source:
        head = source.read(OUTPUT_LAYER, (even_slice(padded_vocab, tp_rank, tp_size),))
    # A copy, since what was read may be the file itself, mapped into memory, and that file may change or go.
    return head.to(device=device, dtype=dtype, copy=True)


def check_weights(path: str | Path, architecture: GPTArchitecture, layer_map: Sequence[int] | None = None) -> None:
    """Check that a model on disk holds every weight of a model, in its shape, and no other (WeightSource.check).

    Raises:
        UserError: the first weight that is missing, misshapen, quantized or not known.
    """
    _check_layer_map(layer_map, architecture, path)
    with open_weights(path) as source:
        source.check(architecture, layer_map)


def _check_layer_map(layer_map: Sequence[int] | None, architecture: GPTArchitecture, path: str | Path) -> None:
    if layer_map is not None and len(layer_map) != architecture.num_layers:
        raise UserError(
            f"{len(layer_map)} layers of {path} are chosen for a model of num_layers {architecture.num_layers}; "
            "choose one for each."
        )
