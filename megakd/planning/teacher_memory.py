"""Bytes of tensors on ranks that are a teacher's alone."""

from __future__ import annotations

from megakd.planning.activations import forward_bytes
from megakd.planning.crossing import sent_tokens
from megakd.planning.job import Job, Model
from megakd.planning.memory import BATCH_BYTES, StageMemory
from megakd.planning.stages import stage_parameters


def teacher_memory(job: Job) -> list[StageMemory]:
    """The memory of each of the teacher's stages where it has ranks of its own; none where it has not."""
    teacher = job.teacher
    if teacher is None or not job.is_dedicated:
        return []
    stages = []
    for stage, parameters in enumerate(stage_parameters(teacher, has_head=False)):
        resident = {"teacher": float(parameters.count * teacher.element_size)}
        if job.is_dense:
            microbatches = job.num_windows * job.teacher_microbatches
            resident["batches"] = job.batches_held * microbatches * job.micro_tokens(teacher) * BATCH_BYTES
        if teacher.layout.sequence_parallel:
            resident["gathered sequences"] = (
                job.micro_tokens(teacher) * teacher.architecture.hidden_size * teacher.element_size
            )
        moments = _moments(job, teacher, is_last=stage == teacher.layout.pp - 1)
        stages.append(StageMemory(0, parameters.count, resident, moments))
    return stages


def _moments(job: Job, teacher: Model, *, is_last: bool) -> dict[str, dict[str, float]]:
    """A layer at work on the last microbatch of a window; on the last stage all of its states, packed once more.

    Windows on their way stay packed until the student has begun a later one.
    """
    tokens, width = job.micro_tokens(teacher), teacher.architecture.hidden_size * teacher.element_size
    at_work = tokens * forward_bytes(teacher)
    if not is_last:
        # The schedule holds on to what it sent until the next one is there.
        return {"teacher": {"passing by": at_work + tokens * width / teacher.layout.sequence_shards}}
    if not job.is_dense:
        return {"teacher": {"passing by": at_work}}
    states = job.teacher_microbatches * tokens * width / teacher.layout.sequence_shards
    packed = sent_tokens(job) * width
    return {
        "teacher": {"passing by": at_work, "signals": states, "to cross": job.windows_ahead * packed},
        "packing": {"signals": states, "to cross": (job.windows_ahead + 1) * packed},
    }
