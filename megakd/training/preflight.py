"""Everything that can be known before a rank starts: files, shapes, layout, tokenizer."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

from megakd.cache.reader import CacheReader
from megakd.checkpoint.record import newest_record
from megakd.common.errors import UserError, naming
from megakd.config.architecture_checks import check_architecture
from megakd.config.checks import check_cache_config, check_config
from megakd.config.layouts import teacher_parallel, teacher_section, with_teacher_alone
from megakd.config.logging_checks import check_profiled_steps
from megakd.config.schema import Config
from megakd.convert import check_can_export, check_weights, read_hf_config
from megakd.convert.hf_config_writing import family_for_export
from megakd.platform import detect_accelerations, resolve_layer_spec
from megakd.training.architectures import (
    exported_folder,
    source_folder,
    student_architecture,
    teacher_architecture,
)
from megakd.training.drift import check_changes, find_changes
from megakd.training.run_folder import CHECKPOINTS
from megakd.training.teacher_cache import cache_codec, check_cache_fits
from megakd.training.train_data import Purpose, held_out_sources, open_held_out_data, open_train_data, run_steps
from megakd.training.vocabulary_checks import check_vocabulary


def preflight(config: Config, world_size: int, *, accept_changes: bool = False) -> None:
    """Check a configuration against the ranks it will run on and the files it names. Builds nothing.

    Args:
        accept_changes: a checkpoint that the run will go on from may be of a run with other settings.

    Raises:
        UserError: the first thing that does not hold, with its remedy.
    """
    check_config(config, world_size)
    if config.run.layer_spec == "transformer_engine":
        resolve_layer_spec(config.run.layer_spec, detect_accelerations())
    _check_wandb(config)
    check_models(config)
    _check_data(config)
    _check_output(config)
    if config.run.export:
        _check_export(config)
    if not accept_changes:
        _check_resumed(config)


def preflight_cache(config: Config, world_size: int) -> None:
    """Check a configuration for the writing of a cache, as `preflight` does for a run.

    Raises:
        UserError: the first thing that does not hold, with its remedy.
    """
    config = with_teacher_alone(config)
    check_cache_config(config, world_size)
    if config.run.layer_spec == "transformer_engine":
        resolve_layer_spec(config.run.layer_spec, detect_accelerations())
    check_teacher_model(config)
    cache_codec(config)
    open_train_data(config)
    _check_positions(config)
    check_vocabulary(config, ("train",), with_student=False)


def check_models(config: Config) -> None:
    """Hold both models' shapes and weights against the layout; reads headers only.

    Raises:
        UserError: the first thing that does not hold.
    """
    length, parallel = config.data.sequence_length, config.parallel
    divisible_by = config.student.make_vocab_size_divisible_by
    check_architecture(
        "student", student_architecture(config), parallel, length, has_stage_split=True, divisible_by=divisible_by
    )
    if config.student.init is not None:
        student = student_architecture(config)
        with naming("student.init.path"):
            check_weights(config.student.init.path, student, config.student.init.layers)
    if config.teacher is not None and config.teacher.source == "online":
        check_teacher_model(config)


def check_teacher_model(config: Config) -> None:
    """Hold the teacher's shape and weights against the layout; reads headers only.

    Raises:
        UserError: the first thing that does not hold.
    """
    assert config.teacher is not None
    teacher = teacher_architecture(config)
    parallel, length = teacher_parallel(config), config.data.sequence_length
    section = teacher_section(config)
    check_architecture("teacher", teacher, parallel, length, has_stage_split=False, section=section)
    with naming("teacher.path"):
        check_weights(config.teacher.path, teacher)


def _check_data(config: Config) -> None:
    data = open_train_data(config)
    steps = run_steps(config, data)
    check_profiled_steps(config, steps)
    if config.teacher is not None and config.teacher.source == "cache":
        check_cache_fits(config, CacheReader(config.teacher.path), data, steps)
    purposes: tuple[Purpose, ...] = ("valid", "test")
    for purpose in purposes:
        if held_out_sources(config, purpose) is not None:
            open_held_out_data(config, purpose)
    _check_positions(config)
    check_vocabulary(config, ("train", *purposes))


def _check_positions(config: Config) -> None:
    """megakd's and megatron-core's rotary positions follow the attention, not position_ids."""
    if not config.data.reset_position_ids or config.data.reset_attention_mask:
        return
    models = {"student": student_architecture(config)}
    if config.teacher is not None:
        models["teacher"] = teacher_architecture(config)
    for role, architecture in models.items():
        if architecture.position_embedding_type == "rope":
            raise UserError(
                f"data.reset_position_ids is true and has no effect on the {role}'s rotary positions while "
                "data.reset_attention_mask is false. Set data.reset_attention_mask to true, or leave both out."
            )


def _check_wandb(config: Config) -> None:
    if config.logging.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "logging.wandb is set, and wandb is not installed here; it must be. Run `pip install wandb` in this "
            "Python, or leave the section out."
        )


def _check_output(config: Config) -> None:
    folder = Path(config.run.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"run.output_dir is {folder}; it must be a folder that can be written to ({error.strerror})."
        ) from error


def _check_resumed(config: Config) -> None:
    """Settings alone; the ranks compare the contents of files too, with the checkpoint that is whole."""
    newest = newest_record(Path(config.run.output_dir) / CHECKPOINTS) if config.checkpoint.resume else None
    if newest is not None:
        path, record = newest
        check_changes(path, [change for change in find_changes(record, config) if change.alters], accepted=False)


def _check_export(config: Config) -> None:
    """A student that cannot be written must not be trained first."""
    source = source_folder(config)
    family_for_export(student_architecture(config), None if source is None else read_hf_config(source))
    check_can_export(exported_folder(config), source)
