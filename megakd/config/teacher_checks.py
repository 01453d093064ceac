"""Rules about where a teacher runs, and how it is laid out there."""

from __future__ import annotations

from megakd.common.errors import UserError
from megakd.config.layouts import (
    TEACHER_PLACING,
    has_own_layout,
    student_ranks,
    teacher_is_dedicated,
    teacher_micro_batch_size,
    teacher_parallel,
    teacher_ranks,
)
from megakd.config.schema import Config
from megakd.config.wording import either, neighbours, ranks_per_replica, replica


def check_teacher_placement(config: Config) -> None:
    """A teacher on ranks of its own needs to be told how many; one on the student's has none."""
    teacher = config.teacher
    if teacher is None or teacher.source == "cache":
        return
    if teacher.placement == "dedicated":
        if teacher.ranks is None:
            raise UserError(
                "teacher.placement is dedicated and teacher.ranks is null; it must say how many of the job's ranks "
                "are the teacher's. Set teacher.ranks, or teacher.placement to colocated."
            )
        data = config.data
        held_out = (data.valid, data.valid_fraction, data.test, data.test_fraction)
        if config.distill.kd_weight == 0 and held_out == (None,) * 4:
            raise UserError(
                "teacher.placement is dedicated, distill.kd_weight is 0 and no held-out data is named; the teacher's "
                "ranks would have nothing to do. Set distill.kd_weight above 0, data.valid or data.valid_fraction to "
                "measure against the teacher, or leave the teacher section out."
            )
        if teacher.offload != "none":
            raise UserError(
                f"teacher.offload is {teacher.offload} and has no effect with teacher.placement dedicated, whose "
                "ranks have nothing else to hold. Leave it out, or set teacher.placement to colocated."
            )
        return
    for key in ("ranks", "prefetch_steps"):
        value = getattr(teacher, key)
        if value is not None:
            raise UserError(
                f"teacher.{key} is {value} and has no effect with teacher.placement colocated. Leave it out, or set "
                "teacher.placement to dedicated."
            )


def check_dedicated_ranks(config: Config, world_size: int) -> None:
    """Some ranks are left to the student."""
    if not teacher_is_dedicated(config):
        return
    of_teacher = teacher_ranks(config, world_size)
    replica_ranks = ranks_per_replica(config.parallel)
    if of_teacher >= world_size:
        own = ranks_per_replica(teacher_parallel(config))
        usable = -(-of_teacher // own) * own
        also = "" if usable == of_teacher else f" with teacher.ranks {usable}"
        raise UserError(
            f"teacher.ranks is {of_teacher} and the run has {world_size} ranks, which leaves {world_size} - "
            f"{of_teacher} = {world_size - of_teacher} to the student; it needs a multiple of "
            f"{replica(config.parallel)} = {replica_ranks}. Start {usable + replica_ranks} ranks{also} "
            "(--nproc-per-node), or lower teacher.ranks."
        )


def check_teacher_layout(config: Config) -> None:
    """A teacher's own layout needs a teacher that runs, and sequences that can be cut."""
    teacher = config.teacher
    if teacher is None:
        return
    if teacher.source == "cache":
        defaults = type(teacher).model_fields
        for key in TEACHER_PLACING:
            if getattr(teacher, key) != defaults[key].default:
                raise UserError(
                    f"teacher.{key} is given and has no effect on a cache (teacher.source), which is no model that "
                    "runs. Leave it out."
                )
        return
    if teacher.signal_window is not None and config.distill.kd_weight == 0:
        raise UserError(
            f"teacher.signal_window is {teacher.signal_window} and has no effect with distill.kd_weight 0: no signals "
            "are held. Leave it out, or set distill.kd_weight above 0."
        )
    parallel, length = teacher_parallel(config), config.data.sequence_length
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise UserError(
            "teacher.parallel.sequence_parallel is true and has no effect with one tensor rank. Set it to false or "
            "teacher.parallel.tensor_model_parallel_size above 1."
        )
    cuts = {"teacher.parallel": parallel.tensor_model_parallel_size} if parallel.sequence_parallel else {}
    if has_own_layout(config):
        # Each of the student's tensor ranks receives a stretch of the teacher's hidden states.
        cuts["parallel"] = config.parallel.tensor_model_parallel_size
    for section, size in cuts.items():
        if length % size:
            raise UserError(
                f"data.sequence_length is {length}; with a teacher in a layout of its own it must be a multiple of "
                f"{section}.tensor_model_parallel_size, {size}. Use {neighbours(length, size)}."
            )


def check_teacher_ranks(config: Config, world_size: int) -> None:
    """The ranks are a whole number of the teacher's replicas, and windows a whole number of their microbatches."""
    teacher = config.teacher
    if teacher is None or teacher.source == "cache":
        return
    parallel = teacher_parallel(config)
    ranks, available = ranks_per_replica(parallel), teacher_ranks(config, world_size)
    if available % ranks:
        if teacher_is_dedicated(config):
            left = ranks_per_replica(config.parallel)
            shares = [
                share
                for share in range(ranks, world_size, ranks)
                if (world_size - share) % left == 0
                and config.data.global_batch_size * left % (config.data.micro_batch_size * (world_size - share)) == 0
            ]
            nearest = sorted(sorted(shares, key=lambda share: abs(share - available))[:2])
            remedy = f"Use {either([str(share) for share in nearest])}, or change" if nearest else "Change"
            raise UserError(
                f"teacher.ranks is {available}; it must be a multiple of the teacher's {replica(parallel)} = {ranks} "
                f"(teacher.parallel), and what it leaves of {world_size} ranks one of the student's "
                f"{replica(config.parallel)} = {left}. {remedy} teacher.parallel or the number of ranks."
            )
        raise UserError(
            f"the run has {available} ranks; there must be a multiple of the teacher's {replica(parallel)} = {ranks} "
            f"(teacher.parallel). Start {neighbours(available, ranks)} ranks, or change teacher.parallel."
        )
    if config.distill.kd_weight == 0:
        return
    data, replicas = config.data, student_ranks(config, world_size) // ranks_per_replica(config.parallel)
    count = data.global_batch_size // (data.micro_batch_size * replicas)
    window = count if teacher.signal_window is None else teacher.signal_window
    micro = teacher_micro_batch_size(config)
    each, unit = data.micro_batch_size * replicas, micro * (available // ranks)
    usable = [str(n) for n in range(1, count + 1) if count % n == 0 and n * each % unit == 0]
    if count % window:
        if usable:
            remedy = f"Use {either(usable)}."
        else:
            remedy = (
                f"None of these is a multiple of the {unit} samples that the teacher takes at a time either. Change "
                "teacher.parallel.micro_batch_size or data.global_batch_size."
            )
        raise UserError(
            f"teacher.signal_window is {window}; it must divide the {count} microbatches of a step "
            f"(data.global_batch_size {data.global_batch_size} / (data.micro_batch_size {data.micro_batch_size} x "
            f"data-parallel size {replicas})). {remedy}"
        )
    if window * each % unit:
        remedy = f"Set teacher.signal_window to {either(usable)}, or change" if usable else "Change"
        raise UserError(
            f"the teacher goes through {window * each} samples at a time ({window} microbatches of "
            f"{data.micro_batch_size} on {replicas} of the student's data ranks); they must be a multiple of "
            f"teacher.parallel.micro_batch_size {micro} x its data-parallel size {available // ranks} = {unit}. "
            f"{remedy} teacher.parallel.micro_batch_size or data.global_batch_size."
        )
