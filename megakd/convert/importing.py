"""Weights of a Hugging Face folder into this rank's parameters, reading only what the rank holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megakd.common.errors import UserError, nearest
from megakd.config.architecture import GPTArchitecture
from megakd.convert.families import family_of_config
from megakd.convert.hf_config import architecture_from_hf, read_hf_config
from megakd.convert.mappings import Cut, Shape, load_vocabulary
from megakd.convert.safetensors_folder import SafetensorsFolder
from megakd.convert.table import Family
from megakd.models.sharding import (
    OUTPUT_LAYER,
    WORD_EMBEDDINGS,
    even_slice,
    layer_of,
    padded_vocab_size,
    parameter_shapes,
    shard_of,
)

_FLOATS = ("F64", "F32", "F16", "BF16")


@torch.no_grad()
def load_hf_weights(
    parameters: Iterable[tuple[str, Tensor]],
    folder_path: str | Path,
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
        architecture: the model's that is filled, not the folder's where layers are left out.
        divisible_by: the vocabulary is padded to a multiple of it.
        layer_map: the folder's layer for each layer of the model (depth pruning); None for the same.

    Raises:
        UserError: a weight is missing or has another shape than the parameter.
    """
    family = _family(folder_path)
    cut = Cut(architecture, tp_rank, tp_size, padded_vocab_size(architecture.vocab_size, divisible_by))
    _check_layer_map(layer_map, architecture, folder_path)
    with SafetensorsFolder(folder_path) as folder:
        for name, parameter in parameters:
            row = family.row_of(_stored_name(name, architecture))
            hf_names = row.hf_names(_source_layer(name, layer_map))
            shard = row.mapping.load(folder, hf_names, shard_of(name, architecture), cut)
            if shard.shape != parameter.shape:
                raise UserError(
                    f"{folder.path} gives {name} the shape {_show(shard.shape)} on tensor rank {tp_rank} of {tp_size}; "
                    f"the model needs {_show(parameter.shape)} ({', '.join(hf_names)})."
                )
            parameter.copy_(shard)


def load_hf_head(
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
    name = _stored_name(OUTPUT_LAYER, architecture_from_hf(path))
    (hf_name,) = _family(path).row_of(name).hf_names(None)
    with SafetensorsFolder(path) as folder:
        head = load_vocabulary(folder, hf_name, even_slice(padded_vocab, tp_rank, tp_size))
    return head.to(device=device, dtype=dtype)


def check_hf_weights(path: str | Path, architecture: GPTArchitecture, layer_map: Sequence[int] | None = None) -> None:
    """Check that a folder holds every weight of a model, in its shape, and no other; reads headers only.

    Raises:
        UserError: the first weight that is missing, misshapen, quantized or not known.
    """
    family = _family(path)
    _check_layer_map(layer_map, architecture, path)
    source = architecture_from_hf(path)
    with SafetensorsFolder(path) as folder:
        present = set(folder.names)
        for name, shape in _expected(family, architecture, layer_map).items():
            if name not in present:
                raise UserError(f"{path} has no weight {name}, of shape {_show(shape)}.{nearest(name, present)}")
            if folder.shape(name) != shape:
                raise UserError(
                    f"{name} in {path} has the shape {_show(folder.shape(name))}; config.json means {_show(shape)}."
                )
            if folder.dtype(name) not in _FLOATS:
                raise UserError(f"{name} in {path} is stored as {folder.dtype(name)}; it must be {', '.join(_FLOATS)}.")
        known = set(_expected(family, source, None))
        if source.share_embeddings_and_output_weights:
            known.update(family.row_of(OUTPUT_LAYER).hf_names(None))
        for name in sorted(present - known):
            if not family.ignores(name):
                raise UserError(
                    f"{path} has the weight {name}, which a {family.model_type} model of its config.json does not."
                    f"{nearest(name, known)}"
                )


def _expected(family: Family, architecture: GPTArchitecture, layer_map: Sequence[int] | None) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for name, full in parameter_shapes(architecture, divisible_by=1).items():
        row = family.row_of(name)
        hf_names = row.hf_names(_source_layer(name, layer_map))
        shapes.update(zip(hf_names, row.mapping.hf_shapes(full, architecture), strict=True))
    return shapes


def _family(path: str | Path) -> Family:
    return family_of_config(read_hf_config(path), Path(path) / "config.json")


def _stored_name(name: str, architecture: GPTArchitecture) -> str:
    tied = architecture.share_embeddings_and_output_weights
    return WORD_EMBEDDINGS if tied and name == OUTPUT_LAYER else name


def _source_layer(name: str, layer_map: Sequence[int] | None) -> int | None:
    layer = layer_of(name)
    return layer if layer is None or layer_map is None else layer_map[layer]


def _check_layer_map(layer_map: Sequence[int] | None, architecture: GPTArchitecture, path: str | Path) -> None:
    if layer_map is not None and len(layer_map) != architecture.num_layers:
        raise UserError(
            f"{len(layer_map)} layers of {path} are chosen for a model of num_layers {architecture.num_layers}; "
            "choose one for each."
        )


def _show(shape: Sequence[int]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"
