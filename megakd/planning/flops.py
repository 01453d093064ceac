"""Floating-point operations of a stage for one microbatch, where they are spent."""

from __future__ import annotations

from dataclasses import dataclass

from megakd.job.flops import attention_products, layer_products
from megakd.planning.job import Job, Model


@dataclass(frozen=True)
class StageFlops:
    """Operations of one rank for one microbatch; a multiply-add counts as two.

    Attributes:
        forward, backward: of the student's layers, recomputation included.
        loss: the products with both heads, gradients included.
        teacher: of the teacher's layers on these ranks, for one of its own microbatches.
    """

    forward: float
    backward: float
    loss: float
    teacher: float


def layer_flops(model: Model, sequence_length: int) -> float:
    """A layer's operations for a token on one tensor rank, causal attention as half a square."""
    products = layer_products(model.architecture) + attention_products(model.architecture, sequence_length)
    return 2.0 * products / model.layout.tp


def stage_flops(job: Job) -> list[StageFlops]:
    """The operations of each of the student's stages."""
    n, length = job.micro_tokens(job.student), job.sequence_length
    recompute = job.config.student.recompute_granularity
    layer = layer_flops(job.student, length)
    again = {"none": 0.0, "full": layer}.get(
        recompute, 2.0 * attention_products(job.student.architecture, length) / job.student.layout.tp
    )
    teachers = teacher_flops(job)
    stages = []
    for stage, layers in enumerate(job.student.layout.stage_layers):
        is_last = stage == job.student.layout.pp - 1
        stages.append(
            StageFlops(
                forward=n * layers * layer,
                backward=n * layers * (2 * layer + again),
                loss=n * _loss_flops(job) if is_last else 0.0,
                teacher=max((teachers[held] for held in job.teacher_stages(stage)), default=0.0) if teachers else 0.0,
            )
        )
    return stages


def dedicated_flops(job: Job) -> list[StageFlops]:
    """The operations of each of the teacher's stages where it has ranks of its own."""
    if job.teacher is None or not job.is_dedicated:
        return []
    counts = teacher_flops(job) or [0.0] * job.teacher.layout.pp
    return [StageFlops(0.0, 0.0, 0.0, flops) for flops in counts]


def teacher_flops(job: Job) -> list[float]:
    """Operations of a rank of each of the teacher's stages for one of its microbatches; none where it does not run."""
    if job.teacher is None or not job.is_dense:
        return []
    layer = job.micro_tokens(job.teacher) * layer_flops(job.teacher, job.sequence_length)
    return [layers * layer for layers in job.teacher.layout.stage_layers]


def _loss_flops(job: Job) -> float:
    """Logits, the gradients of hidden state and head, and the teacher's logits."""
    products = 3 * job.student.architecture.hidden_size
    if job.is_dense and job.teacher is not None:
        products += job.teacher.architecture.hidden_size
    return 2.0 * products * job.head_vocab / job.student.layout.tp
