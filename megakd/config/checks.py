"""Rules between keys: one small function each, one line where it fails."""

from __future__ import annotations

import math

from megakd.common.errors import UserError
from megakd.config.architecture_checks import check_architecture
from megakd.config.data_checks import check_best, check_blend, check_evaluation_data, check_held_out_source
from megakd.config.layouts import student_ranks, teacher_is_dedicated
from megakd.config.logging_checks import check_profile, check_profiled_ranks
from megakd.config.loss_checks import (
    check_cache,
    check_cached_teacher,
    check_divergence,
    check_loss_weights,
    check_teacher,
    check_temperature,
    check_without_divergence,
    require_forward_kl,
)
from megakd.config.schema import Config
from megakd.config.teacher_checks import (
    check_dedicated_ranks,
    check_teacher_layout,
    check_teacher_placement,
    check_teacher_ranks,
)
from megakd.config.wording import either, multiples_around, neighbours, ranks_per_replica, replica


def check_config(config: Config, world_size: int | None = None) -> None:
    """Hold every rule against a configuration; those about ranks where `world_size` is given.

    Raises:
        UserError: the first rule that fails: key, value, rule and remedy.
    """
    check_student_source(config)
    check_temperature(config)
    check_divergence(config)
    check_without_divergence(config)
    check_loss_weights(config)
    check_teacher(config)
    check_cached_teacher(config)
    check_cache(config)
    check_held_out_source(config)
    check_blend(config)
    check_evaluation_data(config)
    check_best(config)
    check_run_length(config)
    check_learning_rates(config)
    check_warmup(config)
    check_overlap_param_gather(config)
    check_context_parallel(config)
    check_sequence_parallel(config)
    check_teacher_placement(config)
    check_teacher_layout(config)
    check_stage_split(config)
    check_written_architecture(config)
    check_micro_batches(config)
    check_profile(config)
    if world_size is not None:
        check_dedicated_ranks(config, world_size)
        check_world_size(config, world_size)
        check_global_batch(config, world_size)
        check_profiled_ranks(config, student_ranks(config, world_size))
        check_teacher_ranks(config, world_size)


def check_cache_config(config: Config, world_size: int) -> None:
    """Hold the rules that matter where a cache is written: the teacher alone runs, on `world_size` ranks.

    Raises:
        UserError: the first rule that fails.
    """
    if config.teacher is None or config.teacher.source != "online":
        found = "there is no teacher section" if config.teacher is None else "teacher.source is cache"
        raise UserError(
            f"{found}; a cache is written from a teacher. Set teacher.path to its folder and teacher.source to online."
        )
    require_forward_kl(config, "a cache is to be written")
    check_student_source(config)
    check_temperature(config)
    check_loss_weights(config)
    check_cache(config)
    check_held_out_source(config)
    check_blend(config)
    check_run_length(config)
    check_context_parallel(config)
    check_sequence_parallel(config)
    ranks = ranks_per_replica(config.parallel)
    if world_size % ranks:
        raise UserError(
            f"there are {world_size} ranks to write a cache; there must be a multiple of the teacher's "
            f"{replica(config.parallel)} = {ranks} (teacher.parallel, and parallel where that gives no size). Start "
            f"{neighbours(world_size, ranks)} ranks, or change that."
        )


def check_student_source(config: Config) -> None:
    """The student starts from one thing."""
    given = [key for key in ("init", "architecture") if getattr(config.student, key) is not None]
    if len(given) != 1:
        found = "has both init and architecture" if given else "has neither init nor architecture"
        raise UserError(
            f"student {found}; it must have exactly one. Give student.init.path to start from a Hugging Face folder, "
            "or student.architecture to start from random weights."
        )


def check_run_length(config: Config) -> None:
    """One key says how long the run is."""
    keys = ("train_steps", "train_tokens", "train_epochs")
    given = [f"schedule.{key}" for key in keys if getattr(config.schedule, key) is not None]
    if len(given) != 1:
        found = f"{' and '.join(given)} are given" if given else "the length of the run is missing"
        raise UserError(
            f"{found}; exactly one of schedule.train_steps, train_tokens and train_epochs must be. "
            + ("Set the others to null." if given else "Set schedule.train_steps, for example.")
        )


def check_learning_rates(config: Config) -> None:
    """The rate falls to its minimum, not rises."""
    lr, min_lr = config.optimizer.lr, config.optimizer.min_lr
    if min_lr > lr:
        raise UserError(
            f"optimizer.min_lr is {min_lr:g}; it must be at most optimizer.lr, {lr:g}. Lower it or raise optimizer.lr."
        )


def check_warmup(config: Config) -> None:
    """Warm-up ends before the run does; a run in epochs is as long as its data, which is not known here."""
    schedule, data = config.schedule, config.data
    if schedule.train_steps is not None:
        steps, origin = schedule.train_steps, f"schedule.train_steps, {schedule.train_steps}"
    elif schedule.train_tokens is not None:
        tokens = data.sequence_length * data.global_batch_size
        steps = math.ceil(schedule.train_tokens / tokens)
        origin = (
            f"the run's {steps} steps (schedule.train_tokens {schedule.train_tokens} in steps of data.sequence_length "
            f"{data.sequence_length} x data.global_batch_size {data.global_batch_size} = {tokens} tokens)"
        )
    else:
        return
    if schedule.lr_warmup_steps >= steps:
        raise UserError(
            f"schedule.lr_warmup_steps is {schedule.lr_warmup_steps}; it must be less than {origin}. "
            f"Use at most {steps - 1}, or train for longer."
        )


def check_overlap_param_gather(config: Config) -> None:
    """Parameters are gathered bucket by bucket only where the distributed optimizer cut them for overlapped reduction.

    Without the first, megatron-core never gathers at all; without the second, all parameters are one bucket.
    """
    optimizer = config.optimizer
    if not optimizer.overlap_param_gather:
        return
    for key in ("use_distributed_optimizer", "overlap_grad_reduce"):
        if not getattr(optimizer, key):
            raise UserError(
                f"optimizer.overlap_param_gather is true; it needs optimizer.{key}, which is false. Set "
                f"optimizer.{key} to true, or optimizer.overlap_param_gather to false."
            )


def check_context_parallel(config: Config) -> None:
    """One rank holds a whole sequence."""
    size = config.parallel.context_parallel_size
    if size > 1:
        raise UserError(f"parallel.context_parallel_size is {size}; only 1 is built so far. Set it to 1.")


def check_sequence_parallel(config: Config) -> None:
    """Sequences are cut evenly over tensor ranks."""
    parallel, length = config.parallel, config.data.sequence_length
    tp = parallel.tensor_model_parallel_size
    if not parallel.sequence_parallel:
        return
    if tp == 1:
        raise UserError(
            "parallel.sequence_parallel is true and has no effect with one tensor rank. Set it to false or "
            "tensor_model_parallel_size above 1."
        )
    if length % tp:
        raise UserError(
            f"data.sequence_length is {length}; with parallel.sequence_parallel it must be a multiple of "
            f"parallel.tensor_model_parallel_size, {tp}. Use {neighbours(length, tp)}, or set "
            "parallel.sequence_parallel to false."
        )


def check_stage_split(config: Config) -> None:
    """One stage cannot be split unevenly."""
    parallel = config.parallel
    for key in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
        value = getattr(parallel, key)
        if value is not None and parallel.pipeline_model_parallel_size == 1:
            raise UserError(
                f"parallel.{key} is {value}; it needs parallel.pipeline_model_parallel_size above 1. "
                "Leave it out, or raise parallel.pipeline_model_parallel_size."
            )


def check_written_architecture(config: Config) -> None:
    """A student whose shape is in the configuration fits the layout."""
    if config.student.architecture is not None:
        check_architecture(
            "student",
            config.student.architecture,
            config.parallel,
            config.data.sequence_length,
            has_stage_split=True,
            divisible_by=config.student.make_vocab_size_divisible_by,
        )


def check_micro_batches(config: Config) -> None:
    """A step is a whole number of microbatches."""
    batch, micro = config.data.global_batch_size, config.data.micro_batch_size
    if batch % micro:
        raise UserError(
            f"data.global_batch_size is {batch}; it must be a multiple of data.micro_batch_size, {micro}. "
            f"Use {neighbours(batch, micro)}, or another data.micro_batch_size."
        )


def check_world_size(config: Config, world_size: int) -> None:
    """The ranks are a whole number of model replicas."""
    ranks, students = ranks_per_replica(config.parallel), student_ranks(config, world_size)
    if not students % ranks:
        return
    if teacher_is_dedicated(config):
        of_teacher = world_size - students
        totals = either([str(n + of_teacher) for n in multiples_around(students, ranks)])
        raise UserError(
            f"the run has {world_size} ranks, of which teacher.ranks {of_teacher} are the teacher's and {students} the "
            f"student's; the student's must be a multiple of {replica(config.parallel)} = {ranks}, the ranks of one "
            f"model replica. Start {totals} ranks, or change teacher.ranks or the parallel section."
        )
    raise UserError(
        f"the run has {world_size} ranks; there must be a multiple of {replica(config.parallel)} = {ranks}, the "
        f"ranks of one model replica. Start {neighbours(world_size, ranks)} ranks, or change the parallel section."
    )


def check_global_batch(config: Config, world_size: int) -> None:
    """Every data-parallel rank has the same number of microbatches."""
    batch, micro = config.data.global_batch_size, config.data.micro_batch_size
    students = student_ranks(config, world_size)
    replicas = students // ranks_per_replica(config.parallel)
    if batch % (micro * replicas):
        raise UserError(
            f"data.global_batch_size is {batch}; it must be a multiple of data.micro_batch_size {micro} x "
            f"data-parallel size {replicas} = {micro * replicas} ({students} ranks / ({replica(config.parallel)})). "
            f"Use {neighbours(batch, micro * replicas)}."
        )
