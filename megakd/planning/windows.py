"""What it costs to go through a step in several windows: both pipelines run empty after each."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megakd.planning.clusters import Cluster
from megakd.planning.job import Job, with_settings
from megakd.planning.timing import StepTiming, step_timing, without_rounding


@dataclass(frozen=True)
class WindowCost:
    """Seconds of a step more than with one window.

    Attributes:
        step: of the whole step.
        student: of the student's schedule; teacher: of the teacher's, and of fetching it where it is parked.
    """

    step: float
    student: float
    teacher: float


def window_cost(job: Job, cluster: Cluster, timing: StepTiming) -> WindowCost:
    """What teacher.signal_window costs; `timing` is the job's."""
    if job.num_windows == 1:
        return WindowCost(0.0, 0.0, 0.0)
    whole = step_timing(replace(job, config=with_settings(job.config, {"teacher.signal_window": None})), cluster)
    step, student, teacher = (
        without_rounding(getattr(timing, part) - getattr(whole, part), timing.seconds)
        for part in ("seconds", "student", "teacher")
    )
    return WindowCost(step, student, teacher)
