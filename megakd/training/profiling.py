"""torch.profiler's traces of chosen steps on chosen ranks."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from megakd.common.logging import log
from megakd.config.schema import ProfileSection
from megakd.platform import Platform, StepClock

PROFILE = "profile"


class StepProfiler:
    """Traces the steps that the configuration names, where it names this rank; else it does nothing.

    Args:
        folder: the run's folder; traces go into <folder>/profile, each complete or not there.
        clock: names the step's parts in the trace.
    """

    def __init__(
        self, section: ProfileSection | None, folder: Path, rank: int, platform: Platform, clock: StepClock
    ) -> None:
        self._steps = section.steps if section is not None and rank in section.ranks else None
        self._folder, self._rank, self._clock = folder / PROFILE, rank, clock
        self._activities = [torch.profiler.ProfilerActivity.CPU]
        if platform.is_cuda:
            self._activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile: torch.profiler.profile | None = None
        self._traced: list[int] = []

    def before(self, step: int) -> None:
        """Step `step`, counted from 1, begins."""
        if self._steps is None or not self._steps[0] <= step <= self._steps[1]:
            return
        if self._profile is None:
            self._profile = torch.profiler.profile(activities=self._activities)
            self._profile.start()
            self._clock.annotates = True
        self._traced.append(step)

    def after(self, step: int) -> None:
        """Step `step` is over."""
        if self._steps is not None and step >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Write what has been traced, if anything; a run may end before the last step that is wanted."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        self._clock.annotates = False
        profile.stop()
        first, last = self._traced[0], self._traced[-1]
        path = self._folder / f"rank-{self._rank}-steps-{first}-{last}.json.gz"
        self._traced = []
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # The profiler writes nothing and says nothing on a full disk: a trace is whole before it has its name.
            with tempfile.TemporaryDirectory(dir=self._folder) as place:
                unnamed = Path(place) / path.name
                profile.export_chrome_trace(str(unnamed))
                unnamed.replace(path)
        except (OSError, RuntimeError) as error:
            log.warning(f"the profiler's trace {path} could not be written ({error})")
            return
        log.info(f"profile of steps {first} to {last}: {path}")
