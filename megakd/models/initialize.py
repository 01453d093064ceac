"""Random initialisation that does not depend on the layout."""

from __future__ import annotations

import hashlib
import math

import torch

from megakd.config.architecture import GPTArchitecture
from megakd.models.parameters import canonical_parameters
from megakd.parallel.mesh import ModelMesh
from megakd.parameters.shapes import parameter_shapes
from megakd.parameters.sharding import shard_of, take_shard


@torch.no_grad()
def initialize_parameters(
    model: torch.nn.Module, architecture: GPTArchitecture, mesh: ModelMesh, seed: int, divisible_by: int
) -> None:
    """Fill every parameter of this rank's stage from its own generator, seeded by (seed, canonical name).

    Each rank draws the whole tensor and keeps its shard. Weights are normal with `init_method_std`, those that write
    to the residual stream divided by sqrt(2 layers) (Megatron-LM); norms are one, biases and padded rows zero.
    """
    shapes = parameter_shapes(architecture, divisible_by)
    for name, parameter in canonical_parameters(model).items():
        if name == "output_layer.weight" and architecture.share_embeddings_and_output_weights:
            source = "embedding.word_embeddings.weight"
        else:
            source = name
        full = _initial_value(source, shapes[source], architecture, seed)
        parameter.copy_(take_shard(full, shard_of(source, architecture), mesh.tp_rank, mesh.tp_size))


def _initial_value(name: str, shape: tuple[int, ...], architecture: GPTArchitecture, seed: int) -> torch.Tensor:
    if name.endswith("bias"):
        return torch.zeros(shape)
    if "norm" in name:
        return torch.ones(shape)
    std = architecture.init_method_std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * architecture.num_layers)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    full = torch.empty(shape).normal_(0.0, std, generator=generator)
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        full[architecture.vocab_size :] = 0
    return full
