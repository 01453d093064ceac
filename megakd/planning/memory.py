"""Bytes of tensors that a rank of each stage holds: what stays for the whole run, and the worst moment of a step.

Stages are the student's; those of a teacher on ranks of its own are in `teacher_memory.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megakd.losses.chunking import BLOCK_BYTES
from megakd.planning.activations import (
    backward_bytes,
    forward_bytes,
    layer_bytes,
    layer_rotary_bytes,
    norm_bytes,
)
from megakd.planning.job import Job, Model
from megakd.planning.stages import StageParameters, stage_parameters

BATCH_BYTES = 3 * 8 + 4  # tokens, labels and positions, and the mask


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one rank of a stage.

    Attributes:
        resident: by name, what is there throughout.
        moments: by name of a moment of a step, by name of a part, what is there beside that.
    """

    parameters: int
    teacher_parameters: int
    resident: dict[str, float]
    moments: dict[str, dict[str, float]]

    @property
    def worst(self) -> str:
        """The moment that needs most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """All that is there at the worst moment."""
        return self.resident | {name: size for name, size in self.moments[self.worst].items() if size}

    @property
    def peak(self) -> float:
        """Bytes at the worst moment."""
        return sum(self.parts.values())


def stage_memory(job: Job) -> list[StageMemory]:
    """The memory of each of the student's stages."""
    students = stage_parameters(job.student)
    teachers = [] if job.teacher is None else stage_parameters(job.teacher, has_head=False)
    stages = []
    for stage, parameters in enumerate(students):
        held = [teachers[number] for number in job.teacher_stages(stage)]
        teacher = max(held, key=lambda parameters: parameters.count, default=None)
        resident = _resident(job, stage, parameters, teacher)
        moments = _student_moments(job, stage, parameters) | {"optimizer": _optimizer_moment(job, stage, parameters)}
        if job.teacher is not None and teacher is not None:
            moments["teacher"] = _teacher_moment(job, job.teacher, stage, teacher)
        if job.is_dedicated:
            # What was received for a window, and the microbatches that it is unpacked to.
            moments["receiving"] = {"signals": _signals(job, stage), "received": _signals(job, stage)}
        stages.append(StageMemory(parameters.count, _teacher_count(job, stage, teacher), resident, moments))
    return stages


def checkpoint_bytes(job: Job, stage: int) -> float:
    """Bytes of main memory that the copy of a rank's state takes while it is written in the background."""
    parameters = stage_parameters(job.student)[stage]
    return parameters.count * job.student.element_size + _optimizer_bytes(job, parameters.count)


def _is_last(job: Job, stage: int) -> bool:
    return stage == job.student.layout.pp - 1


def _teacher_count(job: Job, stage: int, teacher: StageParameters | None) -> int:
    """Elements of the teacher on a rank: the layers that are there, and the head that the loss needs."""
    return (0 if teacher is None else teacher.count) + _teacher_head(job, stage)


def _teacher_head(job: Job, stage: int) -> int:
    """Elements of the teacher's head on a rank: it lies where the student's does, cut as that is."""
    if job.teacher is None or not _is_last(job, stage):
        return 0
    return job.head_vocab // job.student.layout.tp * job.teacher.architecture.hidden_size


def _optimizer_bytes(job: Job, parameters: int) -> float:
    """Adam's two moments, and the fp32 weights where the model's are bf16."""
    each = 8 + (4 if job.student.element_size == 2 else 0)
    shards = job.student.layout.dp if job.config.optimizer.use_distributed_optimizer else 1
    return parameters * each / shards


def _resident(job: Job, stage: int, parameters: StageParameters, teacher: StageParameters | None) -> dict[str, float]:
    student = job.student
    resident: dict[str, float] = {
        "weights": parameters.count * student.element_size,
        "gradients": parameters.count * 4,
        "optimizer": _optimizer_bytes(job, parameters.count),
    }
    if job.teacher is not None:
        # Parked weights are on the device while the teacher runs; its head stays.
        count = _teacher_head(job, stage) if job.parks_teacher else _teacher_count(job, stage, teacher)
        resident["teacher"] = count * job.teacher.element_size
    token = BATCH_BYTES + (job.signal_bytes if _is_last(job, stage) else 0)
    resident["batches"] = job.batches_held * job.num_microbatches * job.micro_tokens(job.student) * token
    here = (student, None if job.is_dedicated else job.teacher)
    gathered = [m for m in here if m is not None and m.layout.sequence_parallel]
    if gathered:
        # megatron-core keeps one buffer for sequences put together, the widest that was asked for.
        resident["gathered sequences"] = max(
            job.micro_tokens(m) * m.architecture.hidden_size * m.element_size for m in gathered
        )
    return resident


def _signals(job: Job, stage: int) -> float:
    """The teacher's hidden states of a window's microbatches, cut over the student's tensor ranks where they moved."""
    if job.teacher is None or not job.is_dense or not _is_last(job, stage):
        return 0.0
    shards = job.student.layout.tp if job.crosses else job.teacher.layout.sequence_shards
    width = job.teacher.architecture.hidden_size * job.teacher.element_size / shards
    return job.window_microbatches * job.micro_tokens(job.student) * width


def _student_moments(job: Job, stage: int, parameters: StageParameters) -> dict[str, dict[str, float]]:
    """Moments of the student's schedule: one forward, one backward in turn."""
    student, n = job.student, job.micro_tokens(job.student)
    recompute = job.config.student.recompute_granularity
    each = _microbatch_bytes(job, stage, recompute)
    in_flight = min(student.layout.pp - stage, job.window_microbatches)
    shared = {"signals": _signals(job, stage)}
    held = shared | {"activations": in_flight * each}
    e = student.element_size
    redone = n * layer_bytes(job, student) if recompute == "full" else 0.0
    gradient_of_weight = parameters.largest_in_layers * e
    moments = {
        "backward": held | {"passing by": redone + n * backward_bytes(student) + gradient_of_weight},
    }
    if stage == 0:
        # The embedding's gradient is as large as the embedding; one tied on the same rank meets the head's.
        tied = student.architecture.share_embeddings_and_output_weights and student.layout.pp == 1
        gradient = parameters.embedding * e * (2 if tied else 1)
        left = shared | {"activations": (in_flight - 1) * each}
        moments["backward's end"] = left | {"passing by": gradient + n * student.architecture.hidden_size * e}
    if _is_last(job, stage):
        moments["loss"] = held | {"loss": _loss_bytes(job)}
        stand_in = max(parameters.head, parameters.copied) * e
        moments["after the loss"] = held | {"passing by": stand_in}
    return moments


def _microbatch_bytes(job: Job, stage: int, recompute: str) -> float:
    """What a stage keeps of one microbatch between forward and backward."""
    student, n = job.student, job.micro_tokens(job.student)
    a, e, layout = student.architecture, student.element_size, student.layout
    layers = layout.stage_layers[stage]
    each = n * layer_bytes(job, student, recompute=recompute)
    each += job.sequence_length * layer_rotary_bytes(job, student, recompute=recompute)
    kept = layers * each
    boundary = n * a.hidden_size * e / layout.sequence_shards
    if stage > 0 and e == 2 and not job.has_fused_norms:
        kept += boundary  # the input, of which the norm kept a copy in fp32
    if _is_last(job, stage):
        kept += n * norm_bytes(job, student, a.hidden_size) / layout.sequence_shards
        kept += boundary  # the gradient of the last hidden state waits for backward
    else:
        kept += boundary  # the output, until its gradient arrives
    return kept


def _loss_bytes(job: Job) -> float:
    """The fused loss of a microbatch: chunks of logits, hidden states put together, the gradient of the student's."""
    student, n = job.student, job.micro_tokens(job.student)
    width = job.head_vocab / student.layout.tp
    models = [student] + ([job.teacher] if job.is_dense and job.teacher is not None else [])
    logits = len(models) * job.chunk * width * 4
    scratch = 0.0
    if job.signal_ids:
        scratch = _sparse_bytes(job, width)
    elif job.device_type == "cpu":
        scratch = min(BLOCK_BYTES["cpu"], job.chunk * width * 4)
    gathered = sum(
        n * m.architecture.hidden_size * m.element_size
        for m in models
        if m.layout.sequence_parallel or job.device_type == "cuda" or (m is job.teacher and job.crosses)
    )
    h, e = student.architecture.hidden_size, student.element_size
    gradient = n * h * 4 + (n * h * e / student.layout.sequence_shards if e != 4 else 0)
    narrow = 0.0
    if e != 4:
        narrow = job.chunk * width * e  # the product's result, or the logits' gradient, in the models' type
    return logits + scratch + gathered + gradient + narrow


def _sparse_bytes(job: Job, width: float) -> float:
    """What the loss against a cache works with beside the logits, which it overwrites unless it needs them again."""
    # Of an id: its copy and its probability's in the target, then where it is in the logits, and seven figures.
    ids = job.signal_ids * (job.micro_tokens(job.student) * (8 + 4) + job.chunk * (8 + 1 + 7 * 4))
    if job.config.distill.temperature == 1.0:
        return ids
    return ids + 2 * min(BLOCK_BYTES[job.device_type] / 3, job.chunk * width * 4)


def _optimizer_moment(job: Job, stage: int, parameters: StageParameters) -> dict[str, float]:
    """Adam on torch makes two temporaries of a parameter; the fused ones of GPUs make none."""
    passing = 2 * parameters.largest * 4 if job.device_type == "cpu" else 0.0
    if job.config.optimizer.use_distributed_optimizer:
        passing /= job.student.layout.dp
    return {"signals": _signals(job, stage), "passing by": passing}


def _teacher_moment(job: Job, teacher: Model, stage: int, parameters: StageParameters) -> dict[str, float]:
    """The teacher's last microbatch: the hidden states of those before, and a layer at work."""
    moment = {"signals": _signals(job, stage), "passing by": job.micro_tokens(teacher) * forward_bytes(teacher)}
    if job.crosses and teacher.layout.pp - 1 in job.teacher_stages(stage):
        # What is to cross is held as it came, and once more as it is sent.
        width = teacher.architecture.hidden_size * teacher.element_size / teacher.layout.sequence_shards
        moment["to cross"] = 2 * job.teacher_microbatches * job.micro_tokens(teacher) * width
    if job.parks_teacher:
        moment["fetched teacher"] = parameters.count * teacher.element_size
    return moment
