"""Where the time of a run's steps goes: the student made known to a clock, and what the clocks of all ranks say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.common.step_parts import BACKWARD, LOSS, OPTIMIZER, STEP_PARTS, seconds_key
from megakd.parallel.mesh import ModelMesh
from megakd.parallel.schedule_timers import ScheduleTimers
from megakd.platform import MemoryMeter, Platform, StepClock
from megakd.training.build import Student

# Beyond so many ranks those of a pipeline stage are told together, so that a line stays short.
_RANKS_TOLD_APART = 32


def time_student(student: Student, clock: StepClock) -> None:
    """Let megakd's and megatron-core's schedule tell `clock` what the student is doing."""
    config = student.model.config
    config.timers = ScheduleTimers(clock, LOSS if student.mesh.is_last_stage else BACKWARD)
    finalize: Callable[..., None] = config.finalize_model_grads_func

    def finalize_timed(*arguments: Any, **settings: Any) -> None:
        with clock.during(OPTIMIZER):
            finalize(*arguments, **settings)

    config.finalize_model_grads_func = finalize_timed


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step by rank and part, [ranks, parts] in float64, and bytes [ranks, 2]: of late, most so far."""

    seconds: Tensor
    memory: Tensor

    @property
    def step_seconds(self) -> float:
        """The step's length, the mean over ranks."""
        return float(self.seconds.sum(1).mean())

    def part(self, name: str) -> float:
        """A part's seconds, the mean over ranks."""
        return float(self.seconds[:, list(STEP_PARTS).index(name)].mean())

    def most(self, name: str) -> float:
        """A part's seconds on the rank where it took longest."""
        return float(self.seconds[:, list(STEP_PARTS).index(name)].max())

    def figures(self) -> dict[str, float | int]:
        """For the step's record: means over ranks, which add up to `step_seconds`, and the fullest rank's memory."""
        means = {seconds_key(part): round(self.part(part), 6) for part in STEP_PARTS}
        late, peak = self.memory.amax(0).tolist()
        return {"step_seconds": self.step_seconds, **means, "memory_bytes": int(late), "peak_memory_bytes": int(peak)}


class RankTimes:
    """Brings the ranks' clocks together after each step, and sums up between two lines of step_times.jsonl.

    All methods are collective.
    """

    def __init__(self, mesh: ModelMesh, platform: Platform) -> None:
        self._device = platform.device
        self._memory: MemoryMeter = platform.memory_meter()
        self._layout = mesh.describe()
        per_stage = len(mesh.ranks) // mesh.pp_size
        self._stages = [mesh.ranks.index(rank) // per_stage for rank in range(dist.get_world_size())]
        self._steps = 0
        self._seconds = torch.zeros(len(self._stages), len(STEP_PARTS), dtype=torch.float64)
        self._memory_peak = torch.zeros(len(self._stages), dtype=torch.float64)

    def gather(self, seconds: Mapping[str, float]) -> StepTimes:
        """The step's times over all ranks, on every rank, from this rank's."""
        mine = [*(seconds[part] for part in STEP_PARTS), *self._memory.read()]
        figures = torch.tensor(mine, dtype=torch.float64, device=self._device)
        of_ranks = [torch.empty_like(figures) for _ in self._stages]
        dist.all_gather(of_ranks, figures)
        table = torch.stack(of_ranks).cpu()
        times = StepTimes(table[:, : len(STEP_PARTS)], table[:, len(STEP_PARTS) :])
        self._steps += 1
        self._seconds += times.seconds
        self._memory_peak = torch.maximum(self._memory_peak, times.memory[:, 0])
        return times

    def take(self, step: int) -> dict[str, Any]:
        """A line on the steps since the last one, up to `step`: seconds a step by rank and part, and memory."""
        seconds = (self._seconds / max(self._steps, 1)).round(decimals=6)
        rows = [
            _row({"stage": stage, "rank": rank}, seconds[rank], self._memory_peak[rank])
            for rank, stage in enumerate(self._stages)
        ]
        if len(rows) > _RANKS_TOLD_APART:
            rows = []
            for stage in sorted(set(self._stages)):
                of_stage = torch.tensor([place == stage for place in self._stages])
                mean = seconds[of_stage].mean(0).round(decimals=6)
                rows.append(
                    _row({"stage": stage, "ranks": int(of_stage.sum())}, mean, self._memory_peak[of_stage].max())
                )
        line = {"step": step, "steps": self._steps, "layout": self._layout, "rows": rows}
        self._steps = 0
        self._seconds.zero_()
        self._memory_peak.zero_()
        return line


def _row(place: dict[str, int], seconds: Tensor, memory: Tensor) -> dict[str, Any]:
    parts = dict(zip(STEP_PARTS, seconds.tolist(), strict=True))
    return {**place, "seconds": parts, "memory_bytes": int(memory)}
