"""Rules between keys: one small function each, one line where it fails."""

from __future__ import annotations

import math

from megakd.common.errors import UserError
from megakd.config.architecture_checks import check_architecture
from megakd.config.layouts import student_ranks, teacher_is_dedicated
from megakd.config.logging_checks import check_profile, check_profiled_ranks
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
    _require_forward_kl(config, "a cache is to be written")
    check_student_source(config)
    check_temperature(config)
    check_loss_weights(config)
    check_cache(config)
    check_held_out_source(config)
    check_blend(config)
    check_run_length(config)
    check_context_parallel(config)
    check_sequence_parallel(config)
    check_world_size(config, world_size)


def check_student_source(config: Config) -> None:
    """The student starts from one thing."""
    given = [key for key in ("init", "architecture") if getattr(config.student, key) is not None]
    if len(given) != 1:
        found = "has both init and architecture" if given else "has neither init nor architecture"
        raise UserError(
            f"student {found}; it must have exactly one. Give student.init.path to start from a Hugging Face folder, "
            "or student.architecture to start from random weights."
        )


def check_temperature(config: Config) -> None:
    """Logits are divided by the temperature."""
    temperature, teacher_temperature = config.distill.temperature, config.distill.teacher_temperature
    if temperature <= 0:
        raise UserError(
            f"distill.temperature is {temperature:g}; it must be > 0. Use 1.0 to leave the logits unscaled."
        )
    if teacher_temperature is not None and teacher_temperature <= 0:
        raise UserError(
            f"distill.teacher_temperature is {teacher_temperature:g}; it must be > 0. Leave it out to use "
            "distill.temperature for both models."
        )


def check_divergence(config: Config) -> None:
    """A divergence's parameter is given to its own divergence, and inside the range where it means something."""
    distill = config.distill
    owners = {"jsd_beta": ("jsd",), "skew_alpha": ("skew_forward_kl", "skew_reverse_kl")}
    for key, losses in owners.items():
        value = getattr(distill, key)
        if value is None:
            continue
        if distill.loss not in losses:
            raise UserError(
                f"distill.{key} is {value:g} and has no effect on distill.loss {distill.loss}. Leave it out, or set "
                f"distill.loss to {either(list(losses))}."
            )
        if not 0 < value < 1:
            kl = distill.loss.replace("skew_", "")
            ends = "forward_kl (what 0 tends to) or reverse_kl (1)" if key == "jsd_beta" else f"{kl} for 0"
            raise UserError(
                f"distill.{key} is {value:g}; it must be between 0 and 1, both excluded. Use distill.loss {ends}."
            )


def check_without_divergence(config: Config) -> None:
    """Settings of the divergence need a weight on it."""
    distill = config.distill
    if distill.kd_weight > 0:
        return
    for key in ("jsd_beta", "skew_alpha", "teacher_temperature"):
        value = getattr(distill, key)
        if value is not None:
            raise UserError(
                f"distill.{key} is {value:g} and has no effect with distill.kd_weight 0. Leave it out, or set "
                "distill.kd_weight above 0."
            )
    defaults = type(distill).model_fields
    for key in ("loss", "temperature", "temperature_squared"):
        value, default = getattr(distill, key), defaults[key].default
        if value != default:
            raise UserError(
                f"distill.{key} is {str(value).lower()} and has no effect with distill.kd_weight 0. Leave it out "
                f"(or {str(default).lower()}), or set distill.kd_weight above 0."
            )


def check_loss_weights(config: Config) -> None:
    """Something must be trained on."""
    if config.distill.kd_weight == 0 and config.distill.ce_weight == 0:
        raise UserError(
            "distill.kd_weight and distill.ce_weight are both 0; at least one must be > 0. Set distill.kd_weight to 1 "
            "to learn from the teacher, or distill.ce_weight to 1 to learn from the data."
        )


def check_teacher(config: Config) -> None:
    """A divergence needs a teacher."""
    if config.distill.kd_weight > 0 and config.teacher is None:
        raise UserError(
            f"distill.kd_weight is {config.distill.kd_weight:g} and there is no teacher section. Set teacher.path, or "
            "distill.kd_weight to 0 and distill.ce_weight above 0 to train without a teacher."
        )


def check_cached_teacher(config: Config) -> None:
    """A cache serves the divergence that it can, and is no model."""
    teacher, distill = config.teacher, config.distill
    if teacher is None or teacher.source != "cache":
        return
    if teacher.dtype is not None:
        raise UserError(
            f"teacher.dtype is {teacher.dtype} and has no effect on a cache (teacher.source). Leave it out."
        )
    if distill.kd_weight == 0:
        raise UserError(
            "teacher.source is cache and has no effect with distill.kd_weight 0. Leave the teacher section out, or "
            "set distill.kd_weight above 0."
        )
    _require_forward_kl(config, "teacher.source is cache")


def _require_forward_kl(config: Config, found: str) -> None:
    """Of a cache's teacher a few ids are known; `found` begins the message."""
    if config.distill.loss != "forward_kl":
        raise UserError(
            f"{found} and distill.loss is {config.distill.loss}; only forward_kl can be had from some of the teacher's "
            "ids, the others need its probability of every id. Set distill.loss to forward_kl, or use the teacher "
            "itself (teacher.source online)."
        )


def check_cache(config: Config) -> None:
    """Each mode has its own settings."""
    cache = config.cache
    for mode, keys in (("sampled", ("num_samples",)), ("topk", ("k", "log_probability_bits", "tail_samples"))):
        for key in keys:
            value = getattr(cache, key)
            if value is not None and cache.mode != mode:
                raise UserError(
                    f"cache.{key} is {value} and has no effect on cache.mode {cache.mode}. Leave it out, or set "
                    f"cache.mode to {mode}."
                )


def check_held_out_source(config: Config) -> None:
    """Held-out data of each kind comes from one place, and some is left to train on."""
    data = config.data
    for kind in ("valid", "test"):
        sources, fraction = getattr(data, kind), getattr(data, f"{kind}_fraction")
        if sources is not None and fraction is not None:
            raise UserError(
                f"data.{kind} is {sources[0].path!r} and data.{kind}_fraction is {fraction:g}; at most one may be "
                "given. Set the other to null."
            )
    held_out = (data.valid_fraction or 0) + (data.test_fraction or 0)
    if held_out >= 1:
        raise UserError(
            f"data.valid_fraction is {data.valid_fraction:g} and data.test_fraction is {data.test_fraction:g}; "
            f"together they must be below 1. Lower one."
        )


def check_blend(config: Config) -> None:
    """Data sets of a blend are all given weights, or all epochs; held-out data is read once."""
    train = config.data.train
    weights = [source for source in train if source.weight is not None]
    both = [source for source in weights if source.epochs is not None]
    if both or 0 < len(weights) < len(train):
        if both:
            found = f"{both[0].path} has both weight and epochs"
        else:
            other = next(source for source in train if source.weight is None)
            found = f"{weights[0].path} has a weight and {other.path} has none"
        raise UserError(
            f"data.train: {found}; either every data set has a weight, or none has and epochs say how often each is "
            "read. Give all of them weights, or remove the weights."
        )
    if len(train) == 1 and weights:
        raise UserError(
            f"data.train: {train[0].path} has weight {weights[0].weight:g}, which has no effect on a single data set. "
            "Leave it out."
        )
    for key, sources in (("data.valid", config.data.valid), ("data.test", config.data.test)):
        for source in sources or ():
            for name in ("weight", "epochs"):
                if getattr(source, name) is not None:
                    raise UserError(
                        f"{key}: {source.path} has {name} {getattr(source, name):g}; held-out data is read once. "
                        "Leave it out."
                    )


def check_evaluation_data(config: Config) -> None:
    """Evaluations need held-out data."""
    evaluation, split = config.evaluation, config.evaluation.split
    if getattr(config.data, split) is not None or getattr(config.data, f"{split}_fraction") is not None:
        return
    wanted = {"interval": evaluation.interval, "at_start": evaluation.at_start, "at_end": evaluation.at_end}
    for key, value in wanted.items():
        if value:
            text = str(value).lower()
            raise UserError(
                f"evaluation.{key} is {text} and no held-out data is named. Set data.{split} or data.{split}_fraction, "
                f"or leave evaluation.{key} out."
            )
    if split != "valid":
        raise UserError(
            f"evaluation.split is {split} and no such data is named. Set data.{split} or data.{split}_fraction, or "
            "leave evaluation.split out."
        )


def check_best(config: Config) -> None:
    """The best checkpoint is one of several that are measured, by a figure that there is."""
    evaluation, teacher = config.evaluation, config.teacher
    if evaluation.patience is not None and evaluation.metric is None:
        raise UserError(
            f"evaluation.patience is {evaluation.patience} and evaluation.metric is null; patience counts evaluations "
            "without a better metric. Set evaluation.metric to cross_entropy, for example."
        )
    if evaluation.metric is None:
        return
    if evaluation.interval is None:
        raise UserError(
            f"evaluation.metric is {evaluation.metric} and evaluation.interval is null; the best checkpoint is one of "
            "those measured during training. Set evaluation.interval, or leave evaluation.metric out."
        )
    if evaluation.metric in ("kl_to_teacher", "agreement") and (teacher is None or teacher.source != "online"):
        found = "there is no teacher section" if teacher is None else f"teacher.source is {teacher.source}"
        raise UserError(
            f"evaluation.metric is {evaluation.metric} and {found}; it is measured against the teacher itself. Use "
            "cross_entropy or perplexity, or set teacher.source to online."
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
