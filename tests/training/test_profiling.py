"""Traces of chosen steps and ranks, and nothing of others."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megakd.config.schema import ProfileSection
from megakd.platform import StepClock
from megakd.training.profiling import StepProfiler
from tests.training.interrupted import run_distill, run_until_stopped
from tests.training.runs import layout, run_values, write_run_files


def regions(path: Path) -> dict[str, int]:
    """How often each of the clock's names stands in a trace."""
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    found = [name.removeprefix("megakd: ") for name in names if name.startswith("megakd: ")]
    return {name: found.count(name) for name in found}


def test_the_chosen_steps_of_the_chosen_ranks(tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    values = run_values(
        write_run_files(tmp_path), **layout(1, 2), run__export=False, checkpoint__save_at_end=False,
        logging__profile={"steps": [2, 3], "ranks": [1]}, schedule__train_steps=4,
    )  # fmt: skip
    run_ranks(2, run_distill, values)
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert trace.name == "rank-1-steps-2-3.json.gz"
    found = regions(trace)
    # Two steps of four microbatches; backward begins inside the last stage's loss.
    assert found.pop("communication") >= 8
    assert found.pop("optimizer") >= 4
    assert found == {"data": 2, "teacher": 2, "forward": 8, "loss": 16}


def test_a_run_that_stops_between_leaves_what_it_traced(tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    values = run_values(
        write_run_files(tmp_path), run__export=False, logging__profile={"steps": [2, 9]}, schedule__train_steps=9
    )
    run_ranks(1, run_until_stopped, values, 3, 0)
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert trace.name == "rank-0-steps-2-3.json.gz"
    assert regions(trace)["forward"] == 8


def test_a_trace_that_cannot_be_written_ends_nothing(tmp_path: Path, log_messages: list[str]) -> None:
    from megakd.platform import build_platform

    (tmp_path / "profile").write_text("in the way")
    clock = StepClock()
    profiler = StepProfiler(ProfileSection(steps=[1, 1]), tmp_path, 0, build_platform(), clock)
    profiler.before(1)
    assert clock.annotates
    torch.ones(2).sum()
    profiler.after(1)
    profiler.close()
    assert not clock.annotates
    (line,) = log_messages
    assert line.startswith(f"the profiler's trace {tmp_path}/profile/rank-0-steps-1-1.json.gz could not be written (")


@pytest.mark.parametrize(("section", "rank"), [(None, 0), (ProfileSection(steps=[1, 2]), 1)])
def test_ranks_that_are_not_named_trace_nothing(section: ProfileSection | None, rank: int, tmp_path: Path) -> None:
    from megakd.platform import build_platform

    clock = StepClock()
    profiler = StepProfiler(section, tmp_path, rank, build_platform(), clock)
    for step in (1, 2, 3):
        profiler.before(step)
        assert not clock.annotates
        profiler.after(step)
    profiler.close()
    assert list(tmp_path.iterdir()) == []
