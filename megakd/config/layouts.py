"""The layouts that a configuration gives its models."""

from __future__ import annotations

import math

from megakd.config.schema import Config, ParallelSection
from megakd.config.wording import ranks_per_replica

# Keys of the teacher section that say where and when it runs, and nothing about what comes of it.
TEACHER_PLACING = ("parallel", "placement", "ranks", "prefetch_steps", "signal_window", "offload")


def teacher_parallel(config: Config) -> ParallelSection:
    """The teacher's layout: its own settings, and the student's for the rest."""
    assert config.teacher is not None
    own, student = config.teacher.parallel, config.parallel
    tp = own.tensor_model_parallel_size or student.tensor_model_parallel_size
    sequence_parallel = own.sequence_parallel
    if sequence_parallel is None:
        sequence_parallel = student.sequence_parallel and tp > 1
    return ParallelSection(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=own.pipeline_model_parallel_size or student.pipeline_model_parallel_size,
        context_parallel_size=student.context_parallel_size,
        sequence_parallel=sequence_parallel,
    )


def teacher_section(config: Config) -> str:
    """The section whose keys decide on the teacher's layout."""
    assert config.teacher is not None
    return "teacher.parallel" if config.teacher.parallel.model_dump(exclude_none=True) else "parallel"


def teacher_layout_text(config: Config, world_size: int) -> str:
    """The teacher's layout over its ranks, in one phrase."""
    parallel = teacher_parallel(config)
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    return f"TP {tp} x PP {pp} x DP {teacher_ranks(config, world_size) // (tp * pp)}"


def teacher_micro_batch_size(config: Config) -> int:
    """Samples of one of the teacher's forward passes."""
    assert config.teacher is not None
    return config.teacher.parallel.micro_batch_size or config.data.micro_batch_size


def teacher_is_dedicated(config: Config) -> bool:
    """Whether the last of the job's ranks are the teacher's alone."""
    return config.teacher is not None and config.teacher.placement == "dedicated"


def student_ranks(config: Config, world_size: int) -> int:
    """Ranks that train, the first of the job's."""
    return world_size - teacher_ranks(config, world_size) if teacher_is_dedicated(config) else world_size


def teacher_ranks(config: Config, world_size: int) -> int:
    """Ranks that the teacher runs on."""
    assert config.teacher is not None
    return config.teacher.ranks or 0 if teacher_is_dedicated(config) else world_size


def least_ranks(config: Config) -> int:
    """Ranks of the smallest job that holds whole replicas of each model that runs."""
    ranks = ranks_per_replica(config.parallel)
    if config.teacher is None or config.teacher.source != "online":
        return ranks
    if teacher_is_dedicated(config):
        return ranks + (config.teacher.ranks or 0)
    return math.lcm(ranks, ranks_per_replica(teacher_parallel(config)))


def prefetch_steps(config: Config) -> int:
    """Steps that a teacher on ranks of its own may be ahead of the student."""
    assert config.teacher is not None
    return 1 if config.teacher.prefetch_steps is None else config.teacher.prefetch_steps


def windows_per_step(config: Config, students: int) -> int:
    """The teacher's turns in a step on so many of the student's ranks, if it has any."""
    return _step_microbatches(config, students) // window_microbatches(config, students)


def window_microbatches(config: Config, students: int) -> int:
    """The student's microbatches whose signals are held at a time in training."""
    window = None if config.teacher is None else config.teacher.signal_window
    return window or _step_microbatches(config, students)


def _step_microbatches(config: Config, students: int) -> int:
    replicas = students // ranks_per_replica(config.parallel)
    return config.data.global_batch_size // (config.data.micro_batch_size * replicas)


def has_own_layout(config: Config) -> bool:
    """Whether the teacher's hidden states must be moved to get to where the student's are."""
    if teacher_is_dedicated(config):
        return True
    own, student = teacher_parallel(config), config.parallel
    return (
        own.tensor_model_parallel_size != student.tensor_model_parallel_size
        or own.pipeline_model_parallel_size != student.pipeline_model_parallel_size
        or own.sequence_parallel != student.sequence_parallel
        or teacher_micro_batch_size(config) != config.data.micro_batch_size
    )


def with_teacher_alone(config: Config) -> Config:
    """The configuration as the writing of a cache sees it: the run's layout is the teacher's."""
    if config.teacher is None or config.teacher.source != "online":
        return config
    fields = type(config.teacher).model_fields
    alone = {key: fields[key].default for key in TEACHER_PLACING}
    teacher = config.teacher.model_copy(update=alone)
    data = config.data.model_copy(update={"micro_batch_size": teacher_micro_batch_size(config)})
    return config.model_copy(update={"parallel": teacher_parallel(config), "teacher": teacher, "data": data})


def widest_tensor_parallel(config: Config) -> int:
    """Tensor ranks of the model that has more of them, of those that run."""
    size = config.parallel.tensor_model_parallel_size
    if config.teacher is None or config.teacher.source != "online":
        return size
    return max(size, teacher_parallel(config).tensor_model_parallel_size)
