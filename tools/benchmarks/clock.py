#!/usr/bin/env python
"""What telling where a step's time goes costs: the moments noted in a step of a run times what one costs, the wrappers
around collectives, and the gathering of all ranks' times after the step.

Trains as the configuration says, into a folder that is thrown away. On CPU; after `./launch.sh quickstart`:

    torchrun --nproc-per-node 4 tools/benchmarks/clock.py configs/quickstart/distill.yaml schedule.train_steps=10
"""

from __future__ import annotations

import argparse
import json
import tempfile
import timeit
from pathlib import Path

import measure
import torch.distributed as dist

from megakd.common.logging import configure_logging
from megakd.common.step_parts import FORWARD, STEP_PARTS
from megakd.common.watchdog import Watchdog
from megakd.config.load import load_config
from megakd.platform import StepClock, build_platform, init_distributed
from megakd.platform.step_clock import HostMarks


class CountedMarks(HostMarks):
    """The host's clock, which also counts."""

    count = 0

    def mark(self, part: str) -> None:
        """See HostMarks.mark."""
        self.count += 1
        super().mark(part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    platform = build_platform()
    assert not platform.is_cuda, "events of a GPU are not counted here"
    init_distributed(platform)
    configure_logging(dist.get_rank())
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder, src=0)
    own = [f"run.output_dir={folder[0]}", "checkpoint.save_at_end=false", "logging.tensorboard=false",
           "evaluation.at_start=false", "evaluation.at_end=false"]  # fmt: skip
    config = load_config(arguments.config, [*arguments.overrides, *own])

    from megakd.training.run import Run

    run = Run(config, platform, Watchdog(Path(str(folder[0])), dist.get_rank(), None), accept_changes=True)
    marks = run._clock._marks = CountedMarks()
    run.train()
    seconds = dict.fromkeys(STEP_PARTS, 0.0)
    gathered = min(timeit.repeat(lambda: run._rank_times.gather(seconds), number=1, repeat=100))
    if dist.get_rank() == 0:
        records = [json.loads(line) for line in (Path(str(folder[0])) / "metrics.jsonl").read_text().splitlines()]
        shortest = min(record["step_seconds"] for record in records)
        per_step, each, wrapped = marks.count / len(records), _seconds_per_mark(), _seconds_to_wrap()
        total = per_step * each + wrapped + gathered
        print(json.dumps({
            "machine": measure.machine(), "marks_per_step": per_step, "microseconds_per_mark": 1e6 * each,
            "microseconds_to_wrap": 1e6 * wrapped, "microseconds_to_gather": 1e6 * gathered,
            "shortest_step_seconds": shortest, "share_of_the_shortest_step": total / shortest,
        }, indent=2))  # fmt: skip


def _seconds_per_mark() -> float:
    clock = StepClock()
    clock.start()

    def part() -> None:
        clock.enter(FORWARD)
        clock.leave()

    return min(timeit.repeat(part, number=10_000, repeat=20)) / 20_000


def _seconds_to_wrap() -> float:
    from megakd.parallel.timed_collectives import collectives_timed

    clock = StepClock()
    clock.start()

    def wrap() -> None:
        with collectives_timed(clock):
            pass

    return min(timeit.repeat(wrap, number=100, repeat=20)) / 100


if __name__ == "__main__":
    main()
