#!/usr/bin/env python
"""What measuring the teacher again costs: its seconds, as a share of a run's.

Trains as the configuration says, into a folder that is thrown away. On CPU; after `./launch.sh quickstart`:

    python tools/benchmarks/teacher_check.py configs/quickstart/distill.yaml \
        parallel.tensor_model_parallel_size=1 parallel.pipeline_model_parallel_size=1 \
        parallel.num_layers_in_first_pipeline_stage=null schedule.train_steps=120
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch.distributed as dist

from megakd.common.logging import configure_logging
from megakd.common.watchdog import Watchdog
from megakd.config.load import load_config
from megakd.platform import build_platform, init_distributed


class Seconds:
    """How often something was called, and how long that took."""

    def __init__(self) -> None:
        self.calls, self.seconds = 0, 0.0

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its calls counted."""

        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.calls += 1
                self.seconds += time.perf_counter() - started

        return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    platform = build_platform()
    assert not platform.is_cuda, "the clock is the host's"
    init_distributed(platform)
    configure_logging(dist.get_rank())
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder, src=0)
    config = load_config(arguments.config, [*arguments.overrides, f"run.output_dir={folder[0]}"])

    from megakd.training.run import Run

    run = Run(config, platform, Watchdog(Path(str(folder[0])), dist.get_rank(), None), accept_changes=True)
    assert run._teacher_check is not None, "a run with a teacher that computes"
    alone, beside = Seconds(), Seconds()  # windows of its own; the figure of an evaluation's window
    run._check_teacher = alone.counted(run._check_teacher)  # type: ignore[method-assign]
    run._teacher_check._measure = beside.counted(run._teacher_check._measure)  # type: ignore[method-assign]
    whole = Seconds()
    whole.counted(run.train)()
    if dist.get_rank() == 0:
        # What is measured alone is counted in both.
        print(json.dumps({
            "machine": measure.machine(), "run_seconds": whole.seconds, "windows_of_its_own": alone.calls,
            "seconds_of_them": alone.seconds, "microbatches_measured": beside.calls,
            "seconds_of_their_figures": beside.seconds,
            "share_of_the_run_at_most": (alone.seconds + beside.seconds) / whole.seconds,
        }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
