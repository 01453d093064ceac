"""A built model's parameters by canonical name: global layer numbers, one name for every layer spec."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel

from megakd.models.sharding import canonical_name


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
