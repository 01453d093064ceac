#!/usr/bin/env python
"""What measuring the teacher again costs: its seconds of CPU, as a share of a run's on one rank.

Seconds of CPU, since other work on the machine does not stretch them. Trains as the configuration says, into a folder
that is thrown away; after `./launch.sh quickstart`:

    python tools/benchmarks/teacher_check.py configs/quickstart/distill.yaml \
        parallel.tensor_model_parallel_size=1 parallel.pipeline_model_parallel_size=1 \
        parallel.num_layers_in_first_pipeline_stage=null schedule.train_steps=100 data.sequence_length=128 \
        data.valid=null data.valid_fraction=0.05 evaluation.interval=25 evaluation.at_start=false
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
    """How often something was called, and how much of the CPU that took."""

    def __init__(self) -> None:
        self.calls, self.seconds = 0, 0.0

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its calls counted."""

        def call(*arguments: Any) -> Any:
            started = time.process_time()
            try:
                return function(*arguments)
            finally:
                self.calls += 1
                self.seconds += time.process_time() - started

        return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    platform = build_platform()
    init_distributed(platform)
    assert not platform.is_cuda and dist.get_world_size() == 1, "one rank's CPU is counted"
    configure_logging(dist.get_rank())
    folder = tempfile.mkdtemp()
    config = load_config(arguments.config, [*arguments.overrides, f"run.output_dir={folder}"])

    from megakd.training.run import Run

    run = Run(config, platform, Watchdog(Path(folder), dist.get_rank(), None), accept_changes=True)
    assert run._teacher_check is not None, "a run with a teacher that computes"
    alone, beside = Seconds(), Seconds()  # microbatches of its own; the figures of these and of evaluations
    run._check_teacher = alone.counted(run._check_teacher)  # type: ignore[method-assign]
    run._teacher_check._measure = beside.counted(run._teacher_check._measure)  # type: ignore[method-assign]
    whole = Seconds()
    whole.counted(run.train)()
    # What is measured alone is counted in both.
    print(json.dumps({
        "machine": measure.machine(), "run_seconds": whole.seconds, "microbatches_of_its_own": alone.calls,
        "seconds_of_them": alone.seconds, "figures": beside.calls, "seconds_of_figures": beside.seconds,
        "share_of_the_run_at_most": (alone.seconds + beside.seconds) / whole.seconds,
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
