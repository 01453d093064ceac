"""Runs are read back as far as they have come; what is no run is refused in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megakd.common.errors import UserError
from megakd.report.charts import build_charts
from megakd.report.page import report_page
from megakd.report.rank_times import layout_note, mean_of, rank_times
from megakd.report.runs import load_runs
from tests.report.run_folders import SECONDS, step, times, write_run


def test_a_run_that_is_going_on(tmp_path: Path) -> None:
    steps = [step(n) for n in (1, 2, 3)]
    (run,) = load_runs([write_run(tmp_path / "a", steps=steps, end='{"step": 4, "los')])
    assert run.steps.tolist() == [1, 2, 3] and run.notes == []
    assert run.planned_steps == 8
    assert run.columns["loss"].tolist() == [record["loss"] for record in steps]


def test_steps_that_were_skipped_or_jumped(tmp_path: Path) -> None:
    steps = [step(1), step(2, loss=None, grad_norm=None, skipped=True, sample_ids=[1, 2]), step(3, loss_spike=True)]
    (run,) = load_runs([write_run(tmp_path / "a", steps=steps)])
    assert run.events == {"skipped": [2], "loss_spike": [3]}
    assert np.isnan(run.columns["grad_norm"]).tolist() == [False, True, False]
    assert run.last("loss") == steps[2]["loss"]


def test_a_step_trained_twice_counts_once_and_damage_is_told(tmp_path: Path) -> None:
    steps = [step(1), step(2, loss=9.0), step(2, loss=5.0)]
    folder = write_run(tmp_path / "a", steps=steps, end='not a line\n{"step": "x"}\n[1]\n')
    (folder / "evaluations.jsonl").write_text("{\n")
    (folder / "run.json").write_text("{")
    (run,) = load_runs([folder])
    assert run.steps.tolist() == [1, 2] and run.last("loss") == 5.0
    assert run.notes == [
        "run.json is damaged.",
        "metrics.jsonl line 4 is passed over: it is not JSON.",
        'metrics.jsonl line 5 is passed over: step is "x"; it must be a whole number from 0 to 1e+15.',
        "metrics.jsonl line 6 is passed over: it is a list; it must be an object.",
        "evaluations.jsonl line 1 is passed over: it is not JSON.",
    ]
    assert run.planned_steps == 8  # the configuration says so too


def test_a_run_of_another_version(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "future": {"x": 1}, "text": "x"}\n')
    (run,) = load_runs([folder])
    assert (run.label, run.planned_steps, run.evaluations, rank_times(run)) == ("old", None, [], [])
    assert run.column("loss") is not None and run.column("grad_norm") is None and run.column("text") is None
    assert run.notes == ["There is no config.yaml.", "There is no run.json."]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, config={"run__name": name[0]}) for name in ("a1", "a2", "b1")]
    assert [run.label for run in load_runs(folders)] == [f"a ({folders[0]})", f"a ({folders[1]})", "b"]


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda folder: shutil.rmtree(folder), "{} does not exist; give a run's folder (run.output_dir)."),
        (lambda folder: (shutil.rmtree(folder), folder.write_text("")), "{} is a file; give a run's folder"),
        (lambda folder: (folder / "metrics.jsonl").unlink(), "{} has no metrics yet. Wait for the run's first step."),
        (lambda folder: (folder / "metrics.jsonl").write_text('{"st'), "{} has no metrics yet. Wait for"),
        (
            lambda folder: [(folder / name).unlink() for name in ("metrics.jsonl", "config.yaml", "run.json")],
            "{} is no run's folder: it has no metrics.jsonl. Give a folder that is run.output_dir.",
        ),
        (
            lambda folder: ((folder / "metrics.jsonl").unlink(), (folder / "metrics.jsonl").mkdir()),
            "{}/metrics.jsonl cannot be read (Is a directory); a report needs it.",
        ),
    ],
)
def test_what_is_no_run(tmp_path: Path, damage: Callable[[Path], object], line: str) -> None:
    folder = write_run(tmp_path / "a")
    damage(folder)
    with pytest.raises(UserError) as error:
        load_runs([write_run(tmp_path / "good"), folder])
    assert str(error.value).startswith(line.format(folder)) and "\n" not in str(error.value)


def test_a_run_given_twice(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    with pytest.raises(UserError, match="is given twice"):
        load_runs([folder, tmp_path / "a" / ".." / "a"])


def test_rank_times_are_means_over_steps_without_the_first(tmp_path: Path) -> None:
    lines = [times(1, scale=9.0), times(4, 3, scale=1.0), times(8, 1, scale=5.0)]
    (run,) = load_runs([write_run(tmp_path / "a", step_times=lines)])
    found = rank_times(run)
    assert [time.place for time in found] == [f"rank {rank} · stage {rank // 2}" for rank in range(4)]
    for rank, time in enumerate(found):
        expected = {part: seconds * (1 + rank) * (3 * 1 + 1 * 5) / 4 for part, seconds in SECONDS.items()}
        assert time.seconds == pytest.approx(expected)
        assert time.memory_bytes == 2**30
    assert mean_of(found)["teacher"] == pytest.approx(0.2 * 2 * 2.5)


def test_rank_times_of_the_newest_layout(tmp_path: Path) -> None:
    lines = [times(4, 4, ranks=2), {"step": 5}, {"step": 6, "rows": [{"seconds": None}]}, times(8, 4, ranks=4)]
    (run,) = load_runs([write_run(tmp_path / "a", step_times=lines)])
    assert len(rank_times(run)) == 4
    only_first = [times(1, 1, scale=2.0)]
    (run,) = load_runs([write_run(tmp_path / "b", step_times=only_first)])
    assert rank_times(run)[0].seconds["teacher"] == pytest.approx(0.4)


def test_rank_times_of_the_newest_of_layouts_with_the_same_ranks_and_stages(tmp_path: Path) -> None:
    first, then = "TP 2 x PP 2 x DP 1", "TP 1 x PP 2 x DP 2"
    lines = [times(1, layout=first), times(4, 3, scale=7.0, layout=first), times(5, 1, layout=then),
             times(8, 3, scale=5.0, layout=then)]  # fmt: skip
    (run,) = load_runs([write_run(tmp_path / "a", step_times=lines)])
    assert rank_times(run)[0].seconds["teacher"] == pytest.approx(0.2 * (1 * 1 + 3 * 5) / 4)
    told = f"Of the newest layout, {then}, up to step 8; 4 steps under another layout are not counted."
    assert layout_note(run) == told
    assert told in report_page([run], build_charts([run]))
    (run,) = load_runs([write_run(tmp_path / "b", step_times=[times(4, 1, ranks=2), times(8, 4)])])
    assert layout_note(run) == "Of the newest layout, up to step 8; 1 step under another layout is not counted."
    (run,) = load_runs([write_run(tmp_path / "c")])
    assert layout_note(run) == "" and "newest layout" not in report_page([run], build_charts([run]))
