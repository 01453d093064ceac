"""A plan: a run on a cluster, what it needs and how long it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megakd.planning.clusters import Cluster
from megakd.planning.flops import StageFlops, stage_flops
from megakd.planning.job import Job
from megakd.planning.memory import StageMemory, checkpoint_bytes, stage_memory
from megakd.planning.timing import StepTiming, step_timing

GIB = 2.0**30


@dataclass(frozen=True)
class Plan:
    """Memory of each pipeline stage's ranks, and a step's operations, traffic and time."""

    job: Job
    cluster: Cluster
    memory: list[StageMemory]
    flops: list[StageFlops]
    timing: StepTiming

    @property
    def num_nodes(self) -> int:
        """Nodes of the cluster that the ranks fill."""
        return -(-self.job.world_size // self.cluster.ranks_per_node)

    @property
    def capacity(self) -> float:
        """Bytes of a rank's memory that tensors may take."""
        return (self.cluster.memory_gib - self.cluster.reserved_gib) * GIB

    @property
    def peak(self) -> float:
        """Bytes of the rank that needs most."""
        return max(stage.peak for stage in self.memory)

    @property
    def fits(self) -> bool:
        """Whether every rank's tensors fit its memory."""
        return self.peak <= self.capacity

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
            "nodes": self.num_nodes,
            "fits": self.fits,
            "capacity_bytes": self.capacity,
            "peak_bytes": self.peak,
            "stages": [
                {
                    "student_layers": self.job.student.layout.stage_layers[index],
                    "teacher_layers": teacher_layers(self.job, index),
                    "parameters": stage.parameters,
                    "teacher_parameters": stage.teacher_parameters,
                    "peak_bytes": stage.peak,
                    "worst_moment": stage.worst,
                    "parts_bytes": stage.parts,
                    "flops_per_microbatch": vars(flops),
                    "seconds_per_microbatch": vars(seconds),
                }
                for index, (stage, flops, seconds) in enumerate(
                    zip(self.memory, self.flops, timing.stages, strict=True)
                )
            ],
            "microbatches": self.job.num_microbatches,
            "transfers": {name: vars(transfer) for name, transfer in timing.transfers.items()},
            "step": {
                "seconds": timing.seconds,
                "teacher_seconds": timing.teacher,
                "student_seconds": timing.student,
                "bubble_seconds": timing.bubble,
                "exposed_communication_seconds": timing.exposed,
                "optimizer_seconds": timing.optimizer,
                "tokens": self.job.step_tokens,
                "tokens_per_second": self.tokens_per_second,
                "mfu": timing.mfu,
            },
            "dollars_per_billion_tokens": self.price(1e9),
            "steps": self.job.num_steps(),
        }


def teacher_layers(job: Job, stage: int) -> int:
    """The most layers of the teacher that a rank of one of the student's stages holds."""
    if job.teacher is None:
        return 0
    return max((job.teacher.layout.stage_layers[held] for held in job.teacher_stages(stage)), default=0)


def build_plan(job: Job, cluster: Cluster) -> Plan:
    """Work out a run's memory, traffic and time on a cluster."""
    return Plan(job, cluster, stage_memory(job), stage_flops(job), step_timing(job, cluster))
