"""A plan: a run on a cluster, what it needs and how long it takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from megakd.planning.clusters import Cluster
from megakd.planning.flops import StageFlops, dedicated_flops, stage_flops
from megakd.planning.job import Job
from megakd.planning.memory import StageMemory, checkpoint_bytes, stage_memory
from megakd.planning.teacher_memory import teacher_memory
from megakd.planning.timing import StageTiming, StepTiming, step_timing
from megakd.planning.windows import WindowCost, window_cost
from megakd.planning.wording import GIB


@dataclass(frozen=True)
class ClusterPlan(ABC):
    """A job's ranks on a cluster's nodes."""

    job: Job
    cluster: Cluster

    @property
    def num_nodes(self) -> int:
        """Nodes of the cluster that the ranks fill."""
        return -(-self.job.world_size // self.cluster.ranks_per_node)

    @property
    def capacity(self) -> float:
        """Bytes of a rank's memory that tensors may take."""
        return usable_bytes(self.cluster)

    @property
    @abstractmethod
    def peak(self) -> float:
        """Bytes of the rank that needs most."""

    @property
    def fits(self) -> bool:
        """Whether every rank's tensors fit its memory."""
        return self.peak <= self.capacity


@dataclass(frozen=True)
class Plan(ClusterPlan):
    """Memory of each pipeline stage's ranks, and a step's operations, traffic and time.

    Attributes:
        memory: of the student's stages, with what they hold of a teacher on the same ranks.
        teacher_memory, teacher_flops: of the stages of a teacher on ranks of its own.
    """

    memory: list[StageMemory]
    teacher_memory: list[StageMemory]
    flops: list[StageFlops]
    teacher_flops: list[StageFlops]
    timing: StepTiming

    @property
    def peak(self) -> float:
        """Bytes of the rank that needs most."""
        return max(stage.peak for stage in (*self.memory, *self.teacher_memory))

    @property
    def preference(self) -> tuple[bool, float]:
        """To sort by: plans that fit come first, by their time; the others by what they need."""
        return not self.fits, self.timing.seconds if self.fits else self.peak

    @property
    def window_cost(self) -> WindowCost:
        """What the teacher's windows cost of a step's time."""
        return window_cost(self.job, self.cluster, self.timing)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the global batch over the step's estimated time."""
        return self.job.step_tokens / self.timing.seconds

    def price(self, tokens: float) -> float:
        """US dollars for so many tokens."""
        hours = tokens / self.tokens_per_second / 3600
        return hours * self.job.world_size * self.cluster.price_per_gpu_hour

    def node_copy_bytes(self) -> float:
        """Main memory of a node that the copies of its ranks' state take while a checkpoint is written."""
        if not self.job.config.checkpoint.async_save:
            return 0.0
        most = max(checkpoint_bytes(self.job, stage) for stage in range(len(self.memory)))
        return most * min(self.cluster.ranks_per_node, len(self.job.student.layout.ranks))

    def to_dict(self) -> dict[str, Any]:
        """All figures, for programs: bytes, operations, seconds, US dollars."""
        timing = self.timing
        return {
            "cluster": self.cluster.model_dump(),
            "ranks": self.job.world_size,
            "student_ranks": len(self.job.student.layout.ranks),
            "teacher_ranks": 0 if self.job.teacher is None else len(self.job.teacher.layout.ranks),
            "nodes": self.num_nodes,
            "fits": self.fits,
            "capacity_bytes": self.capacity,
            "peak_bytes": self.peak,
            "stages": [
                {
                    "student_layers": self.job.student.layout.stage_layers[index],
                    "teacher_layers": teacher_layers(self.job, index),
                    **_stage_figures(stage, self.flops[index], timing.stages[index]),
                }
                for index, stage in enumerate(self.memory)
            ],
            "teacher_stages": [
                {
                    "teacher_layers": layers,
                    **_stage_figures(stage, self.teacher_flops[index], timing.teacher_stages[index]),
                }
                for index, (layers, stage) in enumerate(dedicated_layers(self))
            ],
            "microbatches": self.job.num_microbatches,
            "transfers": {name: vars(transfer) for name, transfer in timing.transfers.items()},
            "step": {
                "seconds": timing.seconds,
                "teacher_seconds": timing.teacher,
                "crossing_seconds": timing.crossing,
                "student_seconds": timing.student,
                "bubble_seconds": timing.bubble,
                "exposed_communication_seconds": timing.exposed,
                "optimizer_seconds": timing.optimizer,
                "student_waits_seconds": timing.student_waits,
                "teacher_waits_seconds": timing.teacher_waits,
                "windows": self.job.num_windows,
                "windows_cost_seconds": vars(self.window_cost),
                "tokens": self.job.step_tokens,
                "tokens_per_second": self.tokens_per_second,
                "mfu": timing.mfu,
            },
            "dollars_per_billion_tokens": self.price(1e9),
            "steps": self.job.num_steps(),
        }


def usable_bytes(cluster: Cluster) -> float:
    """Bytes of a rank's memory that tensors may take."""
    return (cluster.memory_gib - cluster.reserved_gib) * GIB


def peak_bytes(job: Job) -> float:
    """Bytes of a job's rank that needs most."""
    return max(stage.peak for stage in (*stage_memory(job), *teacher_memory(job)))


def teacher_layers(job: Job, stage: int) -> int:
    """The most layers of the teacher that a rank of one of the student's stages holds."""
    if job.teacher is None:
        return 0
    return max((job.teacher.layout.stage_layers[held] for held in job.teacher_stages(stage)), default=0)


def dedicated_layers(plan: Plan) -> list[tuple[int, StageMemory]]:
    """Layers and memory of each stage of a teacher on ranks of its own."""
    layers = () if plan.job.teacher is None else plan.job.teacher.layout.stage_layers
    return list(zip(layers, plan.teacher_memory, strict=False))


def _stage_figures(memory: StageMemory, flops: StageFlops, seconds: StageTiming) -> dict[str, Any]:
    return {
        "parameters": memory.parameters,
        "teacher_parameters": memory.teacher_parameters,
        "peak_bytes": memory.peak,
        "worst_moment": memory.worst,
        "parts_bytes": memory.parts,
        "flops_per_microbatch": vars(flops),
        "seconds_per_microbatch": vars(seconds),
    }


def build_plan(job: Job, cluster: Cluster) -> Plan:
    """Work out a run's memory, traffic and time on a cluster."""
    return Plan(
        job=job,
        cluster=cluster,
        memory=stage_memory(job),
        teacher_memory=teacher_memory(job),
        flops=stage_flops(job),
        teacher_flops=dedicated_flops(job),
        timing=step_timing(job, cluster),
    )
