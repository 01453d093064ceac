"""What is varied of a layout: recomputation, the stages' split, and what of the teacher saves memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megakd.common.errors import UserError
from megakd.config.schema import Config
from megakd.planning.clusters import Cluster
from megakd.planning.job import Job, build_job, with_settings
from megakd.planning.plan import Plan
from megakd.planning.savers import Settings, offloading, smaller_windows
from megakd.planning.splits import Split, best_split, some_split_fits

_RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Variant:
    """A layout's plan with settings of the student's recomputation and of the teacher, and its best split."""

    plan: Plan
    split: Split
    recompute: str
    teacher_settings: Settings


def best_variant(config: Config, world_size: int, cluster: Cluster) -> Variant:
    """The fastest that fits, of those with the least recomputation, windows and offloading that do; else the leanest.

    Raises:
        UserError: a rule forbids the layout.
    """
    found: list[Variant] = []
    for recompute in _RECOMPUTE:
        changed = with_settings(config, {"student.recompute_granularity": recompute})
        job = build_job(changed, world_size, cluster.device_type)
        plain = _variant(job, cluster, recompute, {})
        found.append(plain)
        if plain.plan.fits:
            break
        found += _with_less_of_the_teacher(job, cluster, recompute)
    return min(found, key=lambda variant: variant.plan.preference)


def could_fit(config: Config, world_size: int, cluster: Cluster) -> bool:
    """Whether anything that is varied makes the layout fit."""
    job = build_job(
        with_settings(config, {"student.recompute_granularity": "full"}), world_size, cluster.device_type
    )  # fmt: skip
    # The smallest window needs least.
    ways = [job, *(jobs[-1][1] for _, jobs in _teacher_variants(job) if jobs)]
    return any(some_split_fits(way, cluster) for way in ways)


def _with_less_of_the_teacher(job: Job, cluster: Cluster, recompute: str) -> Iterator[Variant]:
    """With and without offloading, the largest window with which a split fits; with none, the smallest at the end."""
    for parked, jobs in _teacher_variants(job):
        if jobs and some_split_fits(jobs[-1][1], cluster):
            window, changed = next(pair for pair in jobs if some_split_fits(pair[1], cluster))
            yield _variant(changed, cluster, recompute, parked | window)
        elif jobs and recompute == _RECOMPUTE[-1]:
            yield _variant(jobs[-1][1], cluster, recompute, parked | jobs[-1][0])


def _teacher_variants(job: Job) -> Iterator[tuple[Settings, list[tuple[Settings, Job]]]]:
    """Without and with offloading, smaller windows that the rules allow, the largest first, and what comes of them."""
    windows: list[Settings] = [{"teacher.signal_window": size} for size in smaller_windows(job)]
    for parked in [{}, *offloading(job)]:
        jobs = []
        for window in [{}, *windows] if parked else windows:
            try:
                config = with_settings(job.config, parked | window)
                jobs.append((window, build_job(config, job.world_size, job.device_type)))
            except UserError:
                continue
        yield parked, jobs


def _variant(job: Job, cluster: Cluster, recompute: str, teacher_settings: Settings) -> Variant:
    best = best_split(job, cluster)
    assert best is not None
    return Variant(best[1], best[0], recompute, teacher_settings)
