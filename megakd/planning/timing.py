"""An estimate of a step's time from operations, bytes and the cluster's figures."""

from __future__ import annotations

from dataclasses import dataclass

from megakd.job.flops import step_flops
from megakd.planning.activations import layer_bytes
from megakd.planning.clusters import Cluster
from megakd.planning.crossing import crossing_transfer
from megakd.planning.flops import StageFlops, stage_flops, teacher_flops
from megakd.planning.job import Job, Model
from megakd.planning.schedule import forward_only, one_forward_one_backward
from megakd.planning.stages import stage_parameters
from megakd.planning.traffic import (
    NOTHING,
    Transfer,
    boundary_transfer,
    embedding_transfer,
    gradient_transfer,
    layer_transfer,
    loss_transfer,
    slowest,
    states_transfer,
)

# Elementwise passes over the logits of both models in the fused loss, each reading or writing four bytes.
_LOSS_PASSES = 8
# Adam reads gradient, weight and two moments and writes three of them.
_OPTIMIZER_BYTES = 28.0
# Between main memory and a GPU, of a PCIe 4 link of 16 lanes.
_HOST_GB_PER_S = 25.0
# What a layer keeps is written once; elementwise kernels read and write it about so often, forward.
_ELEMENTWISE = 2.0
# Of sums of as many terms as a step has.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class StageTiming:
    """Seconds of one rank of a stage for one microbatch."""

    forward: float
    backward: float
    loss: float
    teacher: float


@dataclass(frozen=True)
class StepTiming:
    """A step's seconds, by what they are spent on.

    Attributes:
        stages: the student's, with the teacher's layers on the same ranks.
        teacher_stages: those of a teacher on ranks of its own.
        teacher: all of its forward passes, and the way of parked weights to the device.
        crossing: hidden states on their way to the student, which waits for them.
        bubble: of the student's schedule, in which the slowest stage waits.
        exposed: communication of data ranks that nothing hides.
        ideal: of the operations that the models need, recomputation aside, at the peak of all ranks.
        transfers: what the busiest rank sends in a step, by purpose.
        is_ahead: the teacher computes while the student does.
    """

    stages: list[StageTiming]
    teacher_stages: list[StageTiming]
    teacher: float
    crossing: float
    student: float
    bubble: float
    exposed: float
    optimizer: float
    ideal: float
    transfers: dict[str, Transfer]
    is_ahead: bool

    @property
    def student_side(self) -> float:
        """All that the student's ranks do in a step besides what the teacher does."""
        return self.crossing + self.student + self.exposed + self.optimizer

    @property
    def seconds(self) -> float:
        """The whole step; of two sides that work at a time, the slower one's."""
        return max(self.teacher, self.student_side) if self.is_ahead else self.teacher + self.student_side

    @property
    def mfu(self) -> float:
        """Part of the peak of all ranks that the models' operations make use of."""
        return self.ideal / self.seconds

    @property
    def student_waits(self) -> float:
        """Seconds in which ranks of the student's alone have nothing to do."""
        return self.seconds - self.student_side if self.teacher_stages else 0.0

    @property
    def teacher_waits(self) -> float:
        """Seconds in which ranks of the teacher's alone have nothing to do."""
        return self.seconds - self.teacher if self.teacher_stages else 0.0


def step_timing(job: Job, cluster: Cluster) -> StepTiming:
    """Estimate a step: the teacher's window, its way, the student's schedule, the reduction, the update.

    A teacher on ranks of its own computes while the student works on what it has, where it may be ahead. Hidden states
    are received when the student asks for them, so that it waits for their way; the teacher goes on meanwhile.
    """
    stages = stage_timings(job, cluster)
    count, layout = job.window_microbatches, job.student.layout
    passing = [boundary_transfer(job, job.student, cluster, stage).seconds for stage in range(layout.pp - 1)]
    ends = one_forward_one_backward([s.forward + s.loss for s in stages], [s.backward for s in stages], passing, count)
    student = job.num_windows * max(ends)
    busiest = job.num_microbatches * max(s.forward + s.loss + s.backward for s in stages)
    teacher = job.num_windows * _teacher_seconds(job, cluster)
    exposed = max(_exposed(job, cluster, stage, stages[stage]) for stage in range(layout.pp))
    optimizer = max(_optimizer_seconds(job, cluster, stage) for stage in range(layout.pp))
    needed = step_flops(
        job.student.architecture,
        job.teacher.architecture if job.is_dense and job.teacher is not None else None,
        job.sequence_length,
        job.step_tokens,
    )
    peak = cluster.tflops(job.student.element_size) * 1e12 * job.world_size
    return StepTiming(
        stages=stages,
        teacher_stages=_dedicated_timings(job, cluster),
        teacher=teacher,
        crossing=job.num_windows * crossing_transfer(job, cluster).seconds,
        student=student,
        bubble=without_rounding(student - busiest, student),
        exposed=exposed,
        optimizer=optimizer,
        ideal=needed / peak,
        transfers=_step_transfers(job, cluster),
        is_ahead=job.windows_ahead > 0,
    )


def without_rounding(seconds: float, whole: float) -> float:
    """A difference of sums that are about as long as `whole`, 0 where it is no more than their rounding."""
    return seconds if abs(seconds) > _ROUNDING * whole else 0.0


def stage_timings(job: Job, cluster: Cluster) -> list[StageTiming]:
    """The seconds of each of the student's stages."""
    return [_stage_timing(job, cluster, stage, flops) for stage, flops in enumerate(stage_flops(job))]


def _dedicated_timings(job: Job, cluster: Cluster) -> list[StageTiming]:
    """Of each stage of a teacher on ranks of its own."""
    if job.teacher is None or not job.is_dedicated:
        return []
    stages = teacher_stage_seconds(job, cluster) or [0.0] * job.teacher.layout.pp
    return [StageTiming(0.0, 0.0, 0.0, seconds) for seconds in stages]


def _stage_timing(job: Job, cluster: Cluster, stage: int, flops: StageFlops) -> StageTiming:
    layers = job.student.layout.stage_layers[stage]
    forward = _model_seconds(job, cluster, job.student, flops.forward, layers)
    backward = _model_seconds(job, cluster, job.student, flops.backward, 2 * layers)
    forward += layer_transfer(job, job.student, cluster, backward=False).seconds * layers
    backward += layer_transfer(job, job.student, cluster, backward=True).seconds * layers
    if stage == 0:
        forward += embedding_transfer(job, job.student, cluster, backward=False).seconds
        backward += embedding_transfer(job, job.student, cluster, backward=True).seconds
    if job.config.student.recompute_granularity == "full":
        backward += layer_transfer(job, job.student, cluster, backward=False).seconds * layers
    loss = 0.0
    if stage == job.student.layout.pp - 1:
        models = 2 if job.is_dense else 1
        logits = models * job.micro_tokens(job.student) * job.head_vocab / job.student.layout.tp * 4
        loss = product_seconds(cluster, flops.loss, job.student.element_size)
        loss += memory_seconds(cluster, _LOSS_PASSES * logits) + loss_transfer(job, cluster).seconds
        loss += states_transfer(job, cluster).seconds
    teachers = teacher_stage_seconds(job, cluster)
    teacher = max((teachers[held] for held in job.teacher_stages(stage)), default=0.0) if teachers else 0.0
    return StageTiming(forward, backward, loss, teacher)


def teacher_stage_seconds(job: Job, cluster: Cluster) -> list[float]:
    """Seconds of each of the teacher's stages for one of its microbatches; none where it does not run."""
    if job.teacher is None:
        return []
    stages = []
    for stage, flops in enumerate(teacher_flops(job)):
        count = job.teacher.layout.stage_layers[stage]
        seconds = _model_seconds(job, cluster, job.teacher, flops, count)
        seconds += layer_transfer(job, job.teacher, cluster, backward=False).seconds * count
        if stage == 0:
            seconds += embedding_transfer(job, job.teacher, cluster, backward=False).seconds
        stages.append(seconds)
    return stages


def teacher_side_seconds(job: Job, cluster: Cluster) -> float:
    """Of a step: the teacher's forward passes and the way of what comes of them."""
    return job.num_windows * (_teacher_seconds(job, cluster) + crossing_transfer(job, cluster).seconds)


def _teacher_seconds(job: Job, cluster: Cluster) -> float:
    """Of a window: the teacher's pipeline, and the way of parked weights to the device."""
    stages = teacher_stage_seconds(job, cluster)
    if job.teacher is None or not stages:
        return 0.0
    between = [boundary_transfer(job, job.teacher, cluster, stage).seconds for stage in range(len(stages) - 1)]
    seconds = forward_only(stages, between, job.teacher_microbatches)
    if job.parks_teacher:
        largest = max(stage.count for stage in stage_parameters(job.teacher, has_head=False))
        seconds += largest * job.teacher.element_size / (_HOST_GB_PER_S * 1e9)
    return seconds


def _model_seconds(job: Job, cluster: Cluster, model: Model, flops: float, layers: int) -> float:
    """Products, and the elementwise work of so many passes through a layer."""
    elementwise = _ELEMENTWISE * job.micro_tokens(model) * layer_bytes(job, model) * layers
    return product_seconds(cluster, flops, model.element_size) + memory_seconds(cluster, elementwise)


def product_seconds(cluster: Cluster, flops: float, element_size: int) -> float:
    """Of so many operations in products of elements of so many bytes."""
    return flops / (cluster.tflops(element_size) * 1e12 * cluster.product_efficiency)


def memory_seconds(cluster: Cluster, size: float) -> float:
    """Of so many bytes from and to a device's memory."""
    return size / (cluster.memory_gb_per_s * 1e9 * cluster.transfer_efficiency)


def _optimizer_seconds(job: Job, cluster: Cluster, stage: int) -> float:
    shards = job.student.layout.dp if job.config.optimizer.use_distributed_optimizer else 1
    return memory_seconds(cluster, _OPTIMIZER_BYTES * stage_parameters(job.student)[stage].count / shards)


def _exposed(job: Job, cluster: Cluster, stage: int, timing: StageTiming) -> float:
    """What of the data ranks' communication the last backward and the first forward pass do not hide."""
    reduce, collect = gradient_transfer(job, cluster, stage)
    optimizer = job.config.optimizer
    left = reduce.seconds - (timing.backward if optimizer.overlap_grad_reduce else 0.0)
    later = collect.seconds - (timing.forward if optimizer.overlap_param_gather else 0.0)
    return max(0.0, left) + max(0.0, later)


def _step_transfers(job: Job, cluster: Cluster) -> dict[str, Transfer]:
    """By purpose, what the rank that sends most for it sends in a step."""
    count, layout = job.num_microbatches, job.student.layout
    transfers = {"student, tensor ranks": slowest(_student_transfers(job, cluster)).times(count)}
    if job.is_dense and job.teacher is not None:
        turns = job.num_windows * job.teacher_microbatches
        layer = layer_transfer(job, job.teacher, cluster, backward=False)
        first, *others = [layer.times(layers) for layers in job.teacher.layout.stage_layers]
        first = first.plus(embedding_transfer(job, job.teacher, cluster, backward=False))
        transfers["teacher, tensor ranks"] = slowest([first, *others]).times(turns)
        transfers["teacher to student"] = crossing_transfer(job, cluster).times(job.num_windows)
        transfers["teacher's states, student's tensor ranks"] = states_transfer(job, cluster).times(count)
    transfers["loss, tensor ranks"] = loss_transfer(job, cluster).times(count)
    if layout.pp > 1:
        worst = [boundary_transfer(job, job.student, cluster, stage) for stage in range(layout.pp - 1)]
        # Middle stages send activations on and gradients back.
        transfers["student, stages"] = slowest(worst).times(count * (2 if layout.pp > 2 else 1))
    if job.is_dense and job.teacher is not None and job.teacher.layout.pp > 1:
        stages = range(job.teacher.layout.pp - 1)
        worst = [boundary_transfer(job, job.teacher, cluster, stage) for stage in stages]
        turns = job.num_windows * job.teacher_microbatches
        transfers["teacher, stages"] = slowest(worst).times(turns)
    pairs = [gradient_transfer(job, cluster, stage) for stage in range(layout.pp)]
    transfers["gradients, data ranks"] = slowest([reduce for reduce, _ in pairs])
    transfers["parameters, data ranks"] = slowest([collect for _, collect in pairs])
    return {name: transfer for name, transfer in transfers.items() if transfer != NOTHING}


def _student_transfers(job: Job, cluster: Cluster) -> list[Transfer]:
    """Of each stage's tensor ranks for one microbatch, there and back."""
    layer, embedding = NOTHING, NOTHING
    for backward in (False, True):
        layer = layer.plus(layer_transfer(job, job.student, cluster, backward=backward))
        embedding = embedding.plus(embedding_transfer(job, job.student, cluster, backward=backward))
    if job.config.student.recompute_granularity == "full":
        layer = layer.plus(layer_transfer(job, job.student, cluster, backward=False))
    first, *others = [layer.times(layers) for layers in job.student.layout.stage_layers]
    return [first.plus(embedding), *others]
