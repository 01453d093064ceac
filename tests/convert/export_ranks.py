"""What gloo ranks run for the tests of exporting; free of transformers, so that workers start quickly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megakd.common.errors import UserError
from megakd.convert import architecture_from_hf, export_hf, load_weights, shard_writer
from megakd.parameters.shapes import parameter_shapes
from megakd.parameters.sharding import layer_of, shard_of, take_shard


def stage_parameters(
    path: Path, tp_rank: int = 0, tp_size: int = 1, stage: int = 0, stages: int = 1
) -> dict[str, torch.Tensor]:
    """This rank's part of the folder's model; layer i is on stage i * stages // num_layers."""
    architecture = architecture_from_hf(path)
    shapes = parameter_shapes(architecture, 128)
    if architecture.share_embeddings_and_output_weights and stages > 1:
        shapes["output_layer.weight"] = shapes["embedding.word_embeddings.weight"]
    parameters = {}
    for name, shape in shapes.items():
        layer = layer_of(name)
        first = name.startswith("embedding")
        holder = layer * stages // architecture.num_layers if layer is not None else 0 if first else stages - 1
        if holder == stage:
            parameters[name] = take_shard(torch.empty(shape), shard_of(name, architecture), 0, tp_size).clone()
    load_weights(parameters.items(), path, architecture, tp_rank=tp_rank, tp_size=tp_size)
    return parameters


def _grid(tp_size: int, stages: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup, int]:
    """This rank's tensor and pipeline groups and replica; ranks as [stage, replica, tp]."""
    world, me = dist.get_world_size(), dist.get_rank()
    grid = torch.arange(world).reshape(stages, -1, tp_size)
    mine: dict[str, dist.ProcessGroup] = {}
    for kind, rows in (("tp", grid.reshape(-1, tp_size)), ("pp", grid.reshape(stages, -1).T)):
        for row in rows.tolist():
            group = dist.new_group(row)
            if me in row:
                mine[kind] = group
    return mine["tp"], mine["pp"], (grid == me).nonzero()[0][1].item()  # type: ignore[return-value]


def export_from_ranks(source: Path, out: Path, tp_size: int, stages: int, max_shard_bytes: int) -> str:
    tp, pp, replica = _grid(tp_size, stages)
    parameters = stage_parameters(source, tp.rank(), tp_size, pp.rank(), stages)
    if replica:
        for parameter in parameters.values():
            parameter.fill_(torch.nan)
    try:
        export_hf(
            parameters,
            out,
            architecture_from_hf(source),
            tp_group=tp,
            pp_group=pp,
            is_data_rank_0=replica == 0,
            dtype=torch.bfloat16,
            source_config_dir=source,
            max_shard_bytes=max_shard_bytes,
        )
    except UserError as error:
        return str(error)
    return "written" if replica or out.is_dir() else "returned early"


def export_with_failing_disk(source: Path, out: Path) -> str:
    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer.ShardWriter, "add", full_disk)
        return export_from_ranks(source, out, 2, 2, 20_000)
