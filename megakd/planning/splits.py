"""How a student's layers are best spread over its pipeline stages: both heads weigh on the last one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megakd.planning.clusters import Cluster
from megakd.planning.job import Job
from megakd.planning.layout import split_layers
from megakd.planning.plan import Plan, build_plan, peak_bytes, usable_bytes
from megakd.planning.timing import stage_timings

# Simulated in full; the others are ruled out by their slowest stage, unless those do not fit.
_SIMULATED = 6


@dataclass(frozen=True)
class Split:
    """Layers of the first and last stage; None where they are those of the stages between."""

    first: int | None
    last: int | None

    def settings(self) -> dict[str, object]:
        """The configuration's keys."""
        return {
            "parallel.num_layers_in_first_pipeline_stage": self.first,
            "parallel.num_layers_in_last_pipeline_stage": self.last,
        }


def possible_splits(num_layers: int, stages: int) -> Iterator[Split]:
    """Splits whose ends differ from the stages between by half at most, the even one first."""
    if stages == 1:
        yield Split(None, None)
        return
    if num_layers % stages == 0:
        yield Split(None, None)
    if stages == 2:
        yield from (Split(num_layers - last, last) for last in range(1, num_layers) if 2 * last != num_layers)
        return
    for middle in range(1, num_layers // (stages - 2) + 1):
        ends = num_layers - middle * (stages - 2)
        for last in range(max(1, middle // 2), middle + middle // 2 + 1):
            first = ends - last
            if max(1, middle // 2) <= first <= middle + middle // 2 and not first == last == middle:
                yield Split(first, last)


def best_split(job: Job, cluster: Cluster) -> tuple[Split, Plan] | None:
    """The split with the shortest step, of those that fit where any does, else the one that needs least; None where the
    layers cannot be spread.
    """
    splits = [(split, _with_split(job, split)) for split in _splits(job)]
    splits.sort(key=lambda pair: _slowest(pair[1], cluster))
    plans = [(split, build_plan(split_job, cluster)) for split, split_job in splits[:_SIMULATED]]
    if splits and not any(plan.fits for _, plan in plans):
        fitting = [pair for pair in splits[_SIMULATED:] if peak_bytes(pair[1]) <= usable_bytes(cluster)]
        least = min(splits, key=lambda pair: peak_bytes(pair[1]))
        plans += [(split, build_plan(split_job, cluster)) for split, split_job in [*fitting[:_SIMULATED], least]]
    return min(plans, key=lambda pair: pair[1].preference, default=None)


def some_split_fits(job: Job, cluster: Cluster) -> bool:
    """Whether there is a split whose ranks' tensors fit their memory."""
    return any(peak_bytes(_with_split(job, split)) <= usable_bytes(cluster) for split in _splits(job))


def _splits(job: Job) -> Iterator[Split]:
    return possible_splits(job.student.architecture.num_layers, job.student.layout.pp)


def _with_split(job: Job, split: Split) -> Job:
    layout = job.student.layout
    layers = split_layers(job.student.architecture.num_layers, layout.pp, split.first, split.last)
    return replace(job, student=replace(job.student, layout=replace(layout, stage_layers=layers)))


def _slowest(job: Job, cluster: Cluster) -> float:
    """Seconds of the slowest stage for a microbatch."""
    return max(stage.forward + stage.backward + stage.loss for stage in stage_timings(job, cluster))
