"""A built model's parameters by canonical name: global layer numbers, one name for every layer spec."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel

from megakd.config.architecture import GPTArchitecture
from megakd.parameters.sharding import Partition, canonical_name, shard_of


def unwrapped(model: torch.nn.Module) -> GPTModel:
    """The GPT model inside megatron-core's data-parallel wrapper, or the model itself."""
    while not isinstance(model, GPTModel):
        model = model.module  # type: ignore[assignment]
    return model


def canonical_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters; those of a head tied across stages appear as `output_layer.weight` on the last one."""
    gpt = unwrapped(model)
    layers = gpt.decoder.layers
    offset = layers[0].layer_number - 1 if len(layers) else 0
    return {canonical_name(name, offset): parameter for name, parameter in gpt.named_parameters()}


def mark_tensor_parallel(model: torch.nn.Module, architecture: GPTArchitecture) -> None:
    """Tell megakd's canonical partition to megatron-core, which counts only marked shards of other ranks in norms.

    Its own initialisation would set the marks; without it every tensor rank but the first would be left out of the
    gradient norm.
    """
    for name, parameter in canonical_parameters(model).items():
        partition = shard_of(name, architecture)
        if partition is not Partition.REPLICATED:
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
            parameter.partition_dim = 1 if partition is Partition.COLUMNS else 0  # type: ignore[attr-defined]
            parameter.partition_stride = 1  # type: ignore[attr-defined]
