"""What a configuration asks for, in the plain numbers that a plan is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from megakd.cache.manifest import read_manifest
from megakd.common.errors import UserError
from megakd.config.architecture import GPTArchitecture
from megakd.config.architecture_checks import check_architecture
from megakd.config.checks import check_cache_config, check_config
from megakd.config.layouts import (
    has_own_layout,
    prefetch_steps,
    student_ranks,
    teacher_is_dedicated,
    teacher_micro_batch_size,
    teacher_parallel,
    teacher_ranks,
    with_teacher_alone,
)
from megakd.config.schema import Config, ParallelSection
from megakd.losses.chunking import chunk_rows
from megakd.parameters.shapes import padded_vocab_size
from megakd.planning.layout import ModelLayout, split_layers
from megakd.training.architectures import student_architecture, teacher_architecture
from megakd.training.teacher_cache import DRAWS, LARGEST, TAIL_SAMPLES, in_whole_blocks

_Section = TypeVar("_Section", bound=BaseModel)
_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Model:
    """One of a run's models on its share of the ranks.

    Attributes:
        padded_vocab: rows of its embedding over all tensor ranks.
        element_size: bytes of a weight and of an activation.
        micro_batch_size: samples of a forward pass.
    """

    architecture: GPTArchitecture
    layout: ModelLayout
    padded_vocab: int
    element_size: int
    micro_batch_size: int


@dataclass(frozen=True)
class Job:
    """A run on a number of ranks.

    Attributes:
        teacher: the model that runs beside the student, None where there is none or a cache of it.
        signal_ids: of a token, for the teacher's side of the loss, where it comes from a cache.
        signal_bytes: of a token, those ids with their probabilities, and an entropy where there is one.
        head_vocab: rows of both heads over all tensor ranks, the student's padding.
        chunk: rows of both models' logits that exist at a time.
    """

    config: Config
    world_size: int
    device_type: str
    student: Model
    teacher: Model | None
    signal_ids: int
    signal_bytes: int
    head_vocab: int
    chunk: int

    @property
    def has_fused_norms(self) -> bool:
        """Whether norms keep their input alone: Transformer Engine's and torch's kernels on GPU, not torch on CPU."""
        return self.device_type == "cuda"

    @property
    def parks_teacher(self) -> bool:
        """Whether the teacher's layers leave the device while the student runs; on CPU main memory has both."""
        teacher = self.config.teacher
        return teacher is not None and teacher.offload == "cpu" and self.device_type == "cuda"

    @property
    def batches_held(self) -> int:
        """Steps whose batches are on the device: this one, and on CPU the next one, which the data's thread reads."""
        return 2 if self.device_type == "cpu" else 1

    @property
    def is_dedicated(self) -> bool:
        """Whether the teacher has ranks of its own, the job's last."""
        return teacher_is_dedicated(self.config)

    @property
    def windows_ahead(self) -> int:
        """Windows that a teacher on ranks of its own may be ahead of the student."""
        return prefetch_steps(self.config) * self.num_windows if self.is_dedicated else 0

    @property
    def sequence_length(self) -> int:
        """Positions of a sample."""
        return self.config.data.sequence_length

    def micro_tokens(self, model: Model) -> int:
        """Tokens of one of a model's microbatches."""
        return model.micro_batch_size * self.sequence_length

    @property
    def crosses(self) -> bool:
        """Whether the teacher's hidden states are moved from a layout of its own to the student's."""
        return self.is_dense and has_own_layout(self.config)

    @property
    def num_windows(self) -> int:
        """Windows of a step: the teacher's turns, and the student's."""
        teacher = self.config.teacher
        window = None if teacher is None or not self.is_dense else teacher.signal_window
        return 1 if window is None else self.num_microbatches // window

    @property
    def window_microbatches(self) -> int:
        """The student's microbatches of a window."""
        return self.num_microbatches // self.num_windows

    @property
    def teacher_microbatches(self) -> int:
        """The teacher's microbatches of a window."""
        assert self.teacher is not None
        samples = self.config.data.global_batch_size // self.num_windows
        return samples // (self.teacher.micro_batch_size * self.teacher.layout.dp)

    def teacher_stages(self, stage: int) -> list[int]:
        """The teacher's stages that ranks of one of the student's stages hold."""
        if self.teacher is None or self.is_dedicated:
            return []
        mine, theirs = (m.layout.dp * m.layout.tp for m in (self.student, self.teacher))
        return sorted({rank // theirs for rank in range(stage * mine, (stage + 1) * mine)})

    @property
    def num_microbatches(self) -> int:
        """Microbatches that a rank goes through in a step."""
        return self.config.data.global_batch_size // (self.config.data.micro_batch_size * self.student.layout.dp)

    @property
    def step_tokens(self) -> int:
        """Tokens of a step over all ranks."""
        return self.config.data.global_batch_size * self.sequence_length

    @property
    def is_dense(self) -> bool:
        """Whether the divergence is from a teacher's whole distributions."""
        return self.teacher is not None and self.config.distill.kd_weight > 0

    def num_steps(self) -> int | None:
        """Steps of the run; None where that depends on how much data there is."""
        schedule = self.config.schedule
        if schedule.train_steps is not None:
            return schedule.train_steps
        return None if schedule.train_tokens is None else -(-schedule.train_tokens // self.step_tokens)


def find_models(config: Config, shapes: Path | None) -> tuple[Config, list[str]]:
    """The configuration with models that are not here described by their namesakes in `shapes`, and lines that say so.

    Raises:
        UserError: a model is neither here nor in `shapes`.
    """
    lines: list[str] = []

    def found(key: str, path: str) -> str:
        if Path(path).exists():
            return path
        named = _namesake(Path(path).name, shapes)
        if named is None:
            known = "" if shapes is None or not shapes.is_dir() else f", and none of that name in {shapes}"
            raise UserError(
                f"{key} is {path}; there is no such folder{known}. A plan needs the model's config.json: put it into "
                f"{path}, or into a folder {Path(path).name} under --models."
            )
        lines.append(f"{key}: {path} is not here; its shape is taken from {named}")
        return str(named)

    student, teacher = config.student, config.teacher
    if student.init is not None:
        init = student.init.model_copy(update={"path": found("student.init.path", student.init.path)})
        student = student.model_copy(update={"init": init})
    if teacher is not None and teacher.source == "online":
        teacher = teacher.model_copy(update={"path": found("teacher.path", teacher.path)})
    return config.model_copy(update={"student": student, "teacher": teacher}), lines


def _namesake(name: str, shapes: Path | None) -> Path | None:
    """The folder of this name, or of its longest beginning up to a hyphen: Qwen2.5-7B for Qwen2.5-7B-Instruct."""
    if shapes is None or not shapes.is_dir():
        return None
    folders = [file.parent for file in shapes.glob("*/config.json") if f"{name}-".startswith(f"{file.parent.name}-")]
    return max(folders, key=lambda folder: len(folder.name), default=None)


def build_job(config: Config, world_size: int, device_type: str) -> Job:
    """A run's numbers, all rules that need no data and no weights held against it.

    Raises:
        UserError: the first rule that does not hold.
    """
    check_config(config, world_size)
    length, parallel = config.data.sequence_length, config.parallel
    divisible_by = config.student.make_vocab_size_divisible_by
    architecture = student_architecture(config)
    check_architecture("student", architecture, parallel, length, has_stage_split=True, divisible_by=divisible_by)
    element_size = _BYTES[config.run.dtype]
    student = Model(
        architecture,
        _layout(parallel, architecture, range(student_ranks(config, world_size))),
        padded_vocab_size(architecture.vocab_size, divisible_by),
        element_size,
        config.data.micro_batch_size,
    )
    teacher = None
    if config.teacher is not None and config.teacher.source == "online":
        teacher = _teacher(config, world_size)
    dense = teacher is not None and config.distill.kd_weight > 0
    chunk = chunk_rows(
        config.data.micro_batch_size * length,
        student.padded_vocab // student.layout.tp,
        device_type=device_type,
        chunk_mib=config.distill.loss_chunk_mib,
        models=2 if dense else 1,
    )
    signal_ids, has_entropy = _cached_ids(config)
    return Job(
        config=config,
        world_size=world_size,
        device_type=device_type,
        student=student,
        teacher=teacher,
        signal_ids=signal_ids,
        signal_bytes=signal_ids * (8 + 4) + (4 if has_entropy else 0),
        head_vocab=student.padded_vocab,
        chunk=chunk,
    )


def build_cache_job(config: Config, world_size: int, device_type: str) -> Job:
    """The numbers of a run that writes a teacher's cache, in which the teacher has the student's place too.

    Raises:
        UserError: the first rule that does not hold.
    """
    check_cache_config(with_teacher_alone(config), world_size)
    config = in_whole_blocks(with_teacher_alone(config))
    config = with_settings(config, {"distill.kd_weight": 1.0})  # the teacher runs whatever its weight is to be
    teacher = _teacher(config, world_size)
    head_vocab = padded_vocab_size(student_architecture(config).vocab_size, config.student.make_vocab_size_divisible_by)
    chunk = chunk_rows(
        teacher.micro_batch_size * config.data.sequence_length,
        head_vocab // teacher.layout.tp,
        device_type=device_type,
        chunk_mib=config.distill.loss_chunk_mib,
        models=1,
    )
    return Job(
        config=config,
        world_size=world_size,
        device_type=device_type,
        student=teacher,
        teacher=teacher,
        signal_ids=0,
        signal_bytes=0,
        head_vocab=head_vocab,
        chunk=chunk,
    )


def _teacher(config: Config, world_size: int) -> Model:
    """The teacher on its ranks, its shape held against the layout."""
    assert config.teacher is not None
    shape, own = teacher_architecture(config), teacher_parallel(config)
    check_architecture("teacher", shape, own, config.data.sequence_length, has_stage_split=False)
    return Model(
        shape,
        _layout(own, shape, range(world_size - teacher_ranks(config, world_size), world_size)),
        padded_vocab_size(shape.vocab_size, 128),
        _BYTES[config.teacher.dtype or config.run.dtype],
        teacher_micro_batch_size(config),
    )


def with_settings(config: Config, settings: dict[str, object]) -> Config:
    """The same configuration with `section.key` settings replaced, also of sections within sections."""
    for name, value in settings.items():
        config = _with_setting(config, name, value)
    return config


def layout_settings(section: str, tp: int, pp: int, *, sequence_parallel: bool) -> dict[str, object]:
    """A layout under the keys of a section, `parallel` or `teacher.parallel`."""
    return {
        f"{section}.tensor_model_parallel_size": tp,
        f"{section}.pipeline_model_parallel_size": pp,
        f"{section}.sequence_parallel": sequence_parallel,
    }


def _with_setting(section: _Section, name: str, value: object) -> _Section:
    key, _, rest = name.partition(".")
    changed = _with_setting(getattr(section, key), rest, value) if rest else value
    return section.model_copy(update={key: changed})


def _layout(parallel: ParallelSection, architecture: GPTArchitecture, ranks: range) -> ModelLayout:
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    layers = split_layers(architecture.num_layers, pp, first, last)
    is_cut = parallel.sequence_parallel and tp > 1
    return ModelLayout(tp, pp, len(ranks) // (tp * pp), is_cut, layers, ranks.start)


def _cached_ids(config: Config) -> tuple[int, bool]:
    """Ids that the loss takes out of a cache for a token, and whether an entropy comes with them: of that cache, or of
    the one to come.
    """
    if config.teacher is None or config.teacher.source != "cache":
        return 0, False
    path, cache = Path(config.teacher.path), config.cache
    if path.exists():
        settings = read_manifest(path).codec.settings()
        return ids_per_token(settings), settings["mode"] == "sampled" or settings["tail_samples"] > 0
    if cache.mode == "sampled":
        return cache.num_samples or DRAWS, True
    tail_samples = TAIL_SAMPLES if cache.tail_samples is None else cache.tail_samples
    return (cache.k or LARGEST) + tail_samples, tail_samples > 0


def ids_per_token(codec_settings: dict[str, Any]) -> int:
    """Ids that a record of a cache has of a token."""
    if codec_settings["mode"] == "sampled":
        return int(codec_settings["num_samples"])
    return int(codec_settings["k"]) + int(codec_settings["tail_samples"])
