"""Damaged lines are passed over and told, whatever they hold; a report is written of the others."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megakd.cli.main import main
from megakd.common.errors import UserError
from megakd.report.charts import build_charts
from megakd.report.page import report_page
from megakd.report.rank_times import rank_times
from megakd.report.runs import load_runs
from tests.report.run_folders import evaluation, step, times, write_run

FILES = ("metrics.jsonl", "evaluations.jsonl", "step_times.jsonl")
LINES: dict[str, list[dict[str, Any]]] = {
    "metrics.jsonl": [step(n) for n in (1, 2, 3)],
    "evaluations.jsonl": [evaluation(n) for n in (0, 4)],
    "step_times.jsonl": [times(1), times(8, 7)],
}


def times_with(**changes: Any) -> dict[str, Any]:
    """A line of step_times.jsonl whose second row has other values."""
    line = times(8, 7)
    line["rows"][1] |= changes
    return line


@pytest.mark.parametrize(
    ("file", "line", "reason"),
    [
        ("metrics.jsonl", "not JSON", "it is not JSON"),
        ("metrics.jsonl", "[" * 100_000, "it is not JSON"),
        ("metrics.jsonl", "9" * 5000, "it is not JSON"),
        ("metrics.jsonl", "\0\0\0\0", "it is not JSON"),
        ("metrics.jsonl", [1], "it is a list; it must be an object"),
        ("metrics.jsonl", {"loss": 1.0}, "step is null; it must be a whole number from 0 to 1e+15"),
        ("metrics.jsonl", step(4, step=1e30), "step is 1e+30; it must be a whole number from 0 to 1e+15"),
        ("metrics.jsonl", step(4, step=10**30), f"step is {10**30}; it must be a whole number from 0 to 1e+15"),
        ("metrics.jsonl", step(4, step=-1), "step is -1; it must be a whole number from 0 to 1e+15"),
        ("metrics.jsonl", step(4, step=True), "step is true; it must be a whole number from 0 to 1e+15"),
        ("metrics.jsonl", step(4, loss="x" * 99), f'loss is "{"x" * 39}...; it must be a number or null'),
        ("metrics.jsonl", step(4, loss=10**400), f"loss is {10**39}...; it must be from -1e+100 to 1e+100"),
        ("metrics.jsonl", step(4, data_seconds=-1), "data_seconds is -1; it must be from 0 to 1e+100"),
        ("evaluations.jsonl", evaluation(4, agreement=[1]), "agreement is a list; it must be a number or null"),
        ("evaluations.jsonl", evaluation(4, agreement=1e308), "agreement is 1e+308; it must be from -1e+100 to 1e+100"),
        ("step_times.jsonl", {"step": 8}, "rows is null; it must be a list of ranks or stages"),
        ("step_times.jsonl", times(8, 7) | {"steps": None}, "steps is null; it must be a whole number from 1 to 1e+15"),
        ("step_times.jsonl", times_with(seconds=None), "rows[1] has no seconds by part"),
        ("step_times.jsonl", times_with(stage="0"), 'rows[1].stage is "0"; it must be a whole number from 0 to 1e+15'),
        (
            "step_times.jsonl",
            times_with(seconds={"teacher": None}),
            "rows[1].seconds.teacher is null or not finite; it must be a number",
        ),
        (
            "step_times.jsonl",
            times_with(seconds={"teacher": {}}),
            "rows[1].seconds.teacher is an object; it must be a number or null",
        ),
        ("step_times.jsonl", times_with(memory_bytes="x"), 'rows[1].memory_bytes is "x"; it must be a number or null'),
    ],
)  # fmt: skip
def test_a_damaged_line_is_passed_over_with_the_reason(tmp_path: Path, file: str, line: object, reason: str) -> None:
    folder = write_run(tmp_path / "a")
    *whole, last = (folder / file).read_text().splitlines()
    text = line if isinstance(line, str) else json.dumps(line)
    (folder / file).write_text("".join(f"{entry}\n" for entry in (*whole, text, last)))
    (run,) = load_runs([folder])
    assert run.notes == [f"{file} line {len(whole) + 1} is passed over: {reason}."]
    assert run.steps.tolist() == list(range(1, 9)) and len(run.evaluations) == 3 and len(rank_times(run)) == 4


def test_damage_is_told_on_the_console_and_on_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "a", evaluations=[evaluation(0), evaluation(4, cross_entropy=[2.0])])
    assert main(["report", str(folder)]) == 0
    told = "a: evaluations.jsonl line 2 is passed over: cross_entropy is a list; it must be a number or null."
    assert capsys.readouterr().out.splitlines()[0] == told and told in (folder / "report.html").read_text()


def test_of_many_damaged_lines_the_first_are_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", end="{\n" * 5)
    (run,) = load_runs([folder])
    assert run.notes == [
        *(f"metrics.jsonl line {number} is passed over: it is not JSON." for number in (9, 10, 11)),
        "metrics.jsonl: 2 more lines are passed over, up to line 13.",
    ]


def test_what_is_not_finite_counts_as_none(tmp_path: Path) -> None:
    figures = [evaluation(0, kl_to_teacher=float("nan")), evaluation(4, kl_to_teacher=float("inf")), evaluation(8)]
    (run,) = load_runs([write_run(tmp_path / "a", steps=[step(1, loss=float("inf")), step(2)], evaluations=figures)])
    assert [record["kl_to_teacher"] for record in run.evaluations] == [None, None, figures[2]["kl_to_teacher"]]
    assert run.notes == [] and run.last("loss") == 2.5 and "8 <em" in report_page([run], build_charts([run]))


def test_a_run_of_damaged_lines_alone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "a", steps=[], end='{"step": null}\n')
    assert main(["report", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: {folder} has no metrics that can be used: metrics.jsonl line 1 is passed over: step is null; it must "
        "be a whole number from 0 to 1e+15. Give the folder of another run.\n"
    )


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.sampled_from([10**30, -(10**400), 2**63, 1e-320, 1e308, 2**53])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a JSON value, the value itself too."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, entry in inner for place in places(entry, (*at, key)))]


PLACES = [(file, number, place) for file in FILES for number, line in enumerate(LINES[file]) for place in places(line)]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.sampled_from(PLACES), JSON), max_size=4),
    settings_of_run=st.dictionaries(st.sampled_from(["run", "distill", "evaluation", "schedule", "data"]), JSON),
    ends=st.tuples(*[st.binary(max_size=12) | st.just(b'{"step": 9, "lo')] * 3),
    log_loss=st.booleans(),
)
def test_no_contents_end_in_a_traceback(
    tmp_path: Path, changes: list[Any], settings_of_run: dict[str, Any], ends: tuple[bytes, ...], log_loss: bool
) -> None:
    folder, lines = write_run(tmp_path / "a"), copy.deepcopy(LINES)
    for (file, number, place), value in changes:
        inner: Any = lines[file]
        way = [number, *place]
        try:
            for key in way[:-1]:
                inner = inner[key]
            inner[way[-1]] = value
        except (TypeError, KeyError, IndexError):
            continue  # an earlier change has replaced what the place was in
    for file, end in zip(FILES, ends, strict=True):
        (folder / file).write_bytes("".join(json.dumps(line) + "\n" for line in lines[file]).encode() + end)
    (folder / "config.yaml").write_text(json.dumps(settings_of_run))
    (folder / "run.json").write_text(json.dumps(settings_of_run | {"steps": settings_of_run.get("run")}))
    try:
        runs = load_runs([folder])
    except UserError as error:
        assert "\n" not in str(error)
        return
    report_page(runs, build_charts(runs, log_loss=log_loss)).encode("utf-8", "replace")
