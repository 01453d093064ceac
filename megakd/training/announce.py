"""What a run says of itself before its first step."""

from __future__ import annotations

from collections.abc import Iterator

from megakd.config.layouts import (
    has_own_layout,
    prefetch_steps,
    student_ranks,
    teacher_is_dedicated,
    teacher_layout_text,
    teacher_micro_batch_size,
    teacher_ranks,
)
from megakd.config.schema import Config
from megakd.parameters.shapes import num_parameters, padded_vocab_size
from megakd.teacher import CachedTeacher
from megakd.training.architectures import student_architecture, teacher_architecture
from megakd.training.objective import describe_loss
from megakd.training.train_data import HeldOutData, TrainData


def announce(
    config: Config,
    data: TrainData,
    held_out: HeldOutData | None,
    cached_teacher: CachedTeacher | None,
    *,
    layout: str,
    layer_spec: str,
    steps: int,
    device_type: str,
    world_size: int,
) -> Iterator[str]:
    """Models, loss and data, a line each."""
    student = student_architecture(config)
    yield (
        f"{config.run.name}: student of {student.num_layers} layers, {num_parameters(student):,} parameters "
        f"({config.run.dtype}, {layer_spec} layers) on {layout}{_students(config, world_size)}"
    )
    if cached_teacher is not None:
        yield from cached_teacher.describe()
    elif config.teacher is not None:
        teacher = teacher_architecture(config)
        use = "" if config.distill.kd_weight > 0 else ", for evaluation only"
        yield (
            f"teacher {config.teacher.path}: {teacher.num_layers} layers, {num_parameters(teacher):,} parameters"
            f"{use}{_where(config, world_size)}"
        )
    tokens = config.data.sequence_length
    columns = padded_vocab_size(student.vocab_size, config.student.make_vocab_size_divisible_by)
    yield describe_loss(
        config.distill,
        config.data.micro_batch_size * tokens,
        columns // config.parallel.tensor_model_parallel_size,
        device_type,
    )
    yield from data.lines
    yield from held_out.lines if held_out is not None else ()
    batch = config.data.global_batch_size * tokens
    yield f"{steps:,} steps of {batch:,} tokens from {data.order.num_samples:,} samples"


def _students(config: Config, world_size: int) -> str:
    """Which ranks are the student's, if not all."""
    if not teacher_is_dedicated(config):
        return ""
    last = student_ranks(config, world_size) - 1
    return f" of ranks 0 to {last}" if last else " of rank 0"


def _where(config: Config, world_size: int) -> str:
    """Where the teacher lives, and when it runs."""
    assert config.teacher is not None
    students, ranks = student_ranks(config, world_size), teacher_ranks(config, world_size)
    layout = f" on {teacher_layout_text(config, world_size)} of"
    samples = f", microbatches of {teacher_micro_batch_size(config)}"
    if teacher_is_dedicated(config):
        own = f"rank {students}" if ranks == 1 else f"ranks {students} to {world_size - 1}"
        parts = [f"{layout} {own}, its own{samples}"]
        if config.distill.kd_weight > 0:
            steps = prefetch_steps(config)
            ahead = "1 step" if steps == 1 else f"{steps} steps"
            parts.append(f", up to {ahead} ahead" if steps else ", never ahead of the student")
    else:
        parts = [f"{layout} the same ranks{samples}" if has_own_layout(config) else " in the student's layout"]
    if config.teacher.signal_window is not None:
        parts.append(f", windows of {config.teacher.signal_window} of the student's microbatches")
    if config.teacher.offload == "cpu":
        parts.append(", its weights in main memory while the student runs")
    return "".join(parts)
