"""The layouts that a configuration gives its models."""

from __future__ import annotations

from megakd.config.schema import Config, ParallelSection


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


def teacher_micro_batch_size(config: Config) -> int:
    """Samples of one of the teacher's forward passes."""
    assert config.teacher is not None
    return config.teacher.parallel.micro_batch_size or config.data.micro_batch_size


def has_own_layout(config: Config) -> bool:
    """Whether the teacher's hidden states must be moved to get to where the student's are."""
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
    own = type(config.teacher.parallel)()
    teacher = config.teacher.model_copy(update={"parallel": own, "signal_window": None, "offload": "none"})
    return config.model_copy(update={"parallel": teacher_parallel(config), "teacher": teacher})


def widest_tensor_parallel(config: Config) -> int:
    """Tensor ranks of the model that has more of them, of those that run."""
    size = config.parallel.tensor_model_parallel_size
    if config.teacher is None or config.teacher.source != "online":
        return size
    return max(size, teacher_parallel(config).tensor_model_parallel_size)
