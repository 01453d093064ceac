"""What a folder with a model is, told in text."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import torch

from megakd.common.errors import UserError
from megakd.convert.families import family_of_config
from megakd.convert.hf_config import read_hf_config
from megakd.convert.loading import open_weights
from megakd.convert.megatron_weights import MegatronWeights
from megakd.parameters.shapes import num_parameters, parameter_shapes
from megakd.parameters.sharding import in_layer, layer_of


def describe_model(path: str | Path) -> list[str]:
    """Lines that tell format, family, size, types and the shape of every parameter of a model on disk.

    Reads headers only.

    Raises:
        UserError: it is neither a Hugging Face folder nor a Megatron checkpoint, or not whole.
    """
    if not Path(path).is_dir():
        raise UserError(f"{path} is not a folder. Give a Hugging Face folder or a Megatron checkpoint.")
    with open_weights(path) as source:
        architecture = source.architecture
        megatron = isinstance(source, MegatronWeights)
        config_dir = source.config_dir if isinstance(source, MegatronWeights) else Path(path)
        family = family_of_config(read_hf_config(config_dir), config_dir / "config.json")
        source.check(architecture)
        shapes = parameter_shapes(architecture, divisible_by=1)
        types = {name: source.dtype(name) for name in shapes}
    total = sum(math.prod(shape) * types[name].itemsize for name, shape in shapes.items())
    lines = [
        f"{path}: {'Megatron checkpoint (torch_dist)' if megatron else 'Hugging Face folder (safetensors)'}",
        f"family: {family.model_type} ({family.model_class})",
        f"parameters: {num_parameters(architecture):,} in {_count_types(types)}, {total / 2**20:,.1f} MiB",
        f"layers: {architecture.num_layers}, embeddings "
        + ("tied to the output layer" if architecture.share_embeddings_and_output_weights else "of their own"),
    ]
    defaults = type(architecture).model_fields
    told = {field: value for field, value in architecture.model_dump().items() if value != defaults[field].default}
    lines.append("architecture: " + ", ".join(f"{field} {value}" for field, value in told.items()))
    rows = [(name, shape, types[name]) for name, shape in shapes.items() if layer_of(name) in (None, 0)]
    width = max(len(name) for name, _, _ in rows)
    for name, shape, dtype in rows:
        shown = name if layer_of(name) is None else in_layer(name, 0).replace("layers.0.", "layers.*.", 1)
        lines.append(f"  {shown:<{width}}  {_word(dtype):<4}  [{', '.join(str(size) for size in shape)}]")
    return lines


def _count_types(types: dict[str, torch.dtype]) -> str:
    counts = Counter(_word(dtype) for dtype in types.values())
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{word} ({n} tensors)" for word, n in counts.items())


def _word(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]
