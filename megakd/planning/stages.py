"""Parameters of every stage's ranks, counted from the same table that weights are loaded by."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megakd.parameters.shapes import OUTPUT_LAYER, POSITION_EMBEDDINGS, WORD_EMBEDDINGS, parameter_shapes
from megakd.parameters.sharding import Partition, layer_of, shard_of
from megakd.planning.job import Model


@dataclass(frozen=True)
class StageParameters:
    """Parameters that one rank of a stage holds.

    Attributes:
        count: all of them.
        largest: of the largest one; largest_in_layers: of those that belong to a layer.
        embedding, head: of the word embedding and of an untied output layer, 0 where the stage has none.
        copied: of a tied head that another stage holds as its embedding.
    """

    count: int
    largest: int
    largest_in_layers: int
    embedding: int
    head: int
    copied: int


def stage_parameters(model: Model, *, has_head: bool = True) -> list[StageParameters]:
    """What a rank of each stage holds of a model; without `has_head` the output layer lives elsewhere."""
    layout, architecture = model.layout, model.architecture
    layer, outside = _sizes(model)
    stages = []
    for stage, layers in enumerate(layout.stage_layers):
        sizes = dict(outside)
        if stage > 0:
            sizes.pop(WORD_EMBEDDINGS)
            sizes.pop(POSITION_EMBEDDINGS, None)
        if stage < layout.pp - 1:
            sizes = {name: size for name, size in sizes.items() if "embedding" in name}
        if not has_head:
            sizes.pop(OUTPUT_LAYER, None)
        tied = architecture.share_embeddings_and_output_weights
        copied = outside[WORD_EMBEDDINGS] if tied and has_head and stage == layout.pp - 1 > 0 else 0
        stages.append(
            StageParameters(
                count=layers * sum(layer) + sum(sizes.values()) + copied,
                largest=max([copied, *sizes.values(), *layer]),
                largest_in_layers=max(layer),
                embedding=sizes.get(WORD_EMBEDDINGS, 0),
                head=sizes.get(OUTPUT_LAYER, 0),
                copied=copied,
            )
        )
    return stages


def _sizes(model: Model) -> tuple[list[int], dict[str, int]]:
    """Elements on a tensor rank of each parameter of a layer, and of those outside the layers by name."""
    one_layer = model.architecture.model_copy(update={"num_layers": 1})
    layer: list[int] = []
    outside: dict[str, int] = {}
    for name, shape in parameter_shapes(one_layer, 1).items():
        size = math.prod((model.padded_vocab, *shape[1:]) if name in (WORD_EMBEDDINGS, OUTPUT_LAYER) else shape)
        if shard_of(name, one_layer) is not Partition.REPLICATED:
            size //= model.layout.tp
        if layer_of(name) is None:
            outside[name] = size
        else:
            layer.append(size)
    return layer, outside
