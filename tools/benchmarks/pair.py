"""A teacher and a student with random weights, set up as training sets them up, for benchmarks on one rank."""

from __future__ import annotations

from dataclasses import dataclass

import measure  # noqa: F401  puts the repository on the path
import torch

from megakd.platform import build_platform, init_distributed

platform = build_platform()

from megatron.core.optimizer import MegatronOptimizer  # noqa: E402  only after the platform is built

from megakd.config.architecture import GPTArchitecture  # noqa: E402
from megakd.config.schema import OptimizerSection  # noqa: E402
from megakd.models.gpt import build_gpt  # noqa: E402
from megakd.parallel.mesh import GroupPool, ModelMesh, build_model_mesh  # noqa: E402
from megakd.parallel.random_state import seed_megatron  # noqa: E402
from megakd.platform import detect_accelerations, resolve_layer_spec  # noqa: E402
from megakd.teacher import OnlineTeacher, TeacherStage  # noqa: E402
from megakd.training.build import Student, build_adam, wrap_data_parallel  # noqa: E402

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Pair:
    """What a step needs beside its objective."""

    mesh: ModelMesh
    student: Student
    optimizer: MegatronOptimizer
    teacher: OnlineTeacher


def build_pair(small: GPTArchitecture, large: GPTArchitecture, dtype: torch.dtype, *, recompute: str = "none") -> Pair:
    """Both models on this process's device, with the layers that are installed."""
    init_distributed(platform)
    mesh = build_model_mesh(GroupPool())
    seed_megatron(1, mesh)
    layer_spec = resolve_layer_spec("auto", detect_accelerations())
    settings = OptimizerSection(lr=1e-4)
    model = build_gpt(small, mesh, dtype=dtype, layer_spec=layer_spec, seed=1, recompute_granularity=recompute)
    student = Student(wrap_data_parallel(model, mesh, settings), small, mesh, sequence_parallel=False)
    optimizer = build_adam(student, settings, dtype)
    guide = build_gpt(large, mesh, dtype=dtype, layer_spec=layer_spec, seed=2)
    assert guide.output_layer is not None
    head = guide.output_layer.weight.detach()
    guide.drop_head()
    return Pair(mesh, student, optimizer, OnlineTeacher(TeacherStage(guide, mesh), head))


def random_batches(vocab: int, sequence: int, micro_batch: int, count: int = 1) -> list[Batch]:
    """`count` microbatches of random tokens."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        text = torch.randint(vocab, (micro_batch, sequence + 1), generator=generator).to(platform.device)
        tokens = text[:, :-1].contiguous()
        batches.append({
            "tokens": tokens,
            "labels": text[:, 1:].contiguous(),
            "loss_mask": torch.ones(tokens.shape, device=platform.device),
            "position_ids": torch.arange(sequence, device=platform.device).expand(micro_batch, -1),
        })  # fmt: skip
    return batches
