"""A training run under a given layout, inside a gloo worker, with its first gradient gathered to full tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from tests.training import reference


@dataclass(frozen=True)
class Layout:
    """How a run is spread over ranks."""

    world_size: int
    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = False
    micro_batch_size: int = 2
    first_stage: int | None = None
    recompute: str = "none"
    distributed_optimizer: bool = False
    overlap: bool = False
    loss: str = "forward_kl"


@dataclass
class LayoutResult:
    """What rank 0 reports."""

    losses: list[float]
    norms: list[float]
    first_gradient: dict[str, torch.Tensor]


class _ArrayStream:
    def __init__(self, array: np.ndarray) -> None:
        self.prefix, self.num_tokens, self._array = "array", len(array), array

    def slice(self, start: int, stop: int) -> np.ndarray:
        return self._array[start:stop]


class _FileOrder:
    """Samples as they stand in the stream, as the reference reads them."""

    num_samples = reference.STEPS * reference.GLOBAL_BATCH

    def sample_ids(self, start: int, count: int) -> np.ndarray:
        return np.arange(start, start + count) % self.num_samples


def layout_config(layout: Layout, student: str, teacher: str):
    from megakd.config.schema import Config

    return Config.model_validate({
        "run": {"output_dir": "unused", "layer_spec": "local"},
        "student": {"init": {"path": student}, "recompute_granularity": layout.recompute},
        "teacher": {"path": teacher},
        "parallel": {
            "tensor_model_parallel_size": layout.tp,
            "pipeline_model_parallel_size": layout.pp,
            "sequence_parallel": layout.sequence_parallel,
            "num_layers_in_first_pipeline_stage": layout.first_stage,
        },
        "distill": {
            "loss": layout.loss, "kd_weight": reference.KD_WEIGHT, "ce_weight": reference.CE_WEIGHT,
            "temperature": reference.TEMPERATURE,
        },
        "data": {
            "train": "unused", "sequence_length": reference.SEQUENCE, "micro_batch_size": layout.micro_batch_size,
            "global_batch_size": reference.GLOBAL_BATCH,
        },
        "optimizer": {
            "lr": reference.LR, "weight_decay": reference.WEIGHT_DECAY, "adam_beta1": reference.BETAS[0],
            "adam_beta2": reference.BETAS[1], "adam_eps": reference.EPS, "clip_grad": reference.CLIP,
            "use_distributed_optimizer": layout.distributed_optimizer, "overlap_grad_reduce": layout.overlap,
            "overlap_param_gather": layout.overlap and layout.distributed_optimizer,
        },
        "schedule": {"train_steps": reference.STEPS, "lr_decay_style": "constant"},
    })  # fmt: skip


def run_layout(layout: Layout, student_path: str, teacher_path: str) -> LayoutResult:
    """Train and return what happened; collective over the world."""
    from megakd.data.batches import TrainBatches
    from megakd.data.samples import TokenSamples
    from megakd.parallel.random_state import seed_megatron
    from megakd.platform import build_platform
    from megakd.training.architectures import shared_vocab_size
    from megakd.training.build import (
        DTYPES,
        build_adam,
        build_meshes,
        build_student,
        build_teacher,
    )
    from megakd.training.objective import Objective
    from megakd.training.step import accumulate_gradients, train_step

    config, platform = layout_config(layout, student_path, teacher_path), build_platform()
    mesh, teacher_mesh = build_meshes(config)
    assert teacher_mesh is not None
    seed_megatron(config.run.seed, mesh)
    student = build_student(config, mesh, "local")
    optimizer = build_adam(student, config.optimizer, DTYPES[config.run.dtype])
    teacher = build_teacher(config, teacher_mesh, mesh, "local")
    objective = Objective(config.distill, shared_vocab_size(config), mesh.groups.tp, student.sequence_parallel)
    batches = TrainBatches(
        TokenSamples(_ArrayStream(reference.token_stream()), reference.SEQUENCE), _FileOrder(),
        micro_batch_size=layout.micro_batch_size, global_batch_size=reference.GLOBAL_BATCH,
        data_parallel_rank=mesh.dp_rank, data_parallel_size=mesh.dp_size,
    )  # fmt: skip
    losses, norms = [], []
    accumulate_gradients(student, teacher, objective, batches.microbatches(0))
    gradient = gather_gradients(student)
    for step in range(reference.STEPS):
        result = train_step(student, teacher, objective, optimizer, batches.microbatches(step), reference.LR, platform)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    batches.close()
    return LayoutResult(losses, norms, gradient if dist.get_rank() == 0 else {})


def gather_gradients(student) -> dict[str, torch.Tensor]:
    """Full gradients by Hugging Face name, on every rank."""
    from megakd.convert.families import family_of_architecture
    from megakd.models.parameters import canonical_parameters
    from megakd.parameters.sharding import join_shards, shard_of

    mesh, architecture = student.mesh, student.architecture
    if student.model.ddp_config.use_distributed_optimizer:
        for buffer in student.model.buffers:
            for bucket in buffer.buckets:
                whole = bucket.grad_data
                mine = whole.chunk(mesh.dp_size)[mesh.dp_rank].clone()
                dist.all_gather_into_tensor(whole, mine, group=mesh.groups.dp)
    mine = {name: p.main_grad.clone() for name, p in canonical_parameters(student.model).items()}
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (mesh.pp_rank, mesh.dp_rank, mesh.tp_rank, mine))
    shards: dict[str, dict[int, torch.Tensor]] = {}
    for _, dp_rank, tp_rank, gradients in everywhere:
        if dp_rank == 0:
            for name, gradient in gradients.items():
                if not (name == "output_layer.weight" and architecture.share_embeddings_and_output_weights):
                    shards.setdefault(name, {})[tp_rank] = gradient
    family, found = family_of_architecture(architecture), {}
    for name, by_rank in shards.items():
        full = join_shards([by_rank[r] for r in range(mesh.tp_size)], shard_of(name, architecture))
        found.update({hf_name: rows for hf_name, _, rows in family.export(name, full, architecture)})
    return found
