"""Curves say what the records say, with few points and axes that hold them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.image import imread

from megakd.common.step_parts import STEP_PARTS, seconds_key
from megakd.report.axes import format_figure, step_axis, value_axis
from megakd.report.chart_png import save_chart
from megakd.report.charts import Chart, build_charts, condense
from megakd.report.runs import RunData, load_runs
from tests.report.run_folders import SECONDS, evaluation, step, write_run

FIGURES = st.floats(-1e9, 1e9, allow_subnormal=False).map(lambda value: value if abs(value) > 1e-9 else 0.0)


@given(FIGURES, FIGURES, st.booleans(), st.booleans())
def test_axes_hold_their_figures_between_distinct_ticks(a: float, b: float, from_zero: bool, log: bool) -> None:
    low, high = min(a, b), max(a, b)
    if high - low < 1e-6 * max(abs(low), abs(high)):
        high = low
    axis = value_axis(low, high, from_zero=from_zero, log=log)
    margin = 1e-6 * (axis.high - axis.low)
    assert axis.low - margin <= low <= high <= axis.high + margin
    assert axis.log == (log and low > 0)
    ticks = [tick for tick, _ in axis.ticks]
    assert ticks == sorted(set(ticks)) and 2 <= len(ticks) <= 9
    if low == high or (high - low) > 1e-3 * max(abs(low), abs(high)):
        assert len({label for _, label in axis.ticks}) == len(ticks)
    placed = axis.place(np.array([low, high]))
    assert (placed >= 0).all() and (placed <= 1).all()


@given(st.integers(1, 10**7))
@example(11)
@example(12)
def test_step_axes_end_at_the_last_step_and_tick_whole_steps(last: int) -> None:
    axis = step_axis(last)
    assert (axis.low, axis.high) == (0, last)
    assert 2 <= len(axis.ticks) <= 7 and all(tick == int(tick) for tick, _ in axis.ticks if last > 2)


def test_ticks_are_as_precise_as_they_need_to_be() -> None:
    def labels(*arguments: float) -> list[str]:
        return [label for _, label in value_axis(*arguments).ticks]

    assert labels(0.0, 1.0) == ["0", "0.25", "0.50", "0.75", "1.00"]
    assert labels(0.0, 1e-3) == ["0", "2.5e-4", "5e-4", "7.5e-4", "1e-3"]
    assert labels(0.0, 3500.0) == ["0", "1,000", "2,000", "3,000", "4,000"]
    assert labels(0.0, 1e38) == ["0", "2.5e37", "5e37", "7.5e37", "1e38"]
    assert [label for _, label in value_axis(0.2, 900.0, log=True).ticks] == ["0.1", "1", "10", "100", "1,000"]
    assert (axis := value_axis(1.0, 100.0, log=True)).place(np.array([10.0])) == pytest.approx(0.5), axis


def test_figures_that_hardly_differ_or_are_hardly_any_have_an_axis() -> None:
    for low, high in ((1.0, 1.0 + 2**-52), (0.0, 5e-324), (-5e-324, 5e-324), (5e-324, 5e-324), (1e100, 1e100)):
        for axis in (value_axis(low, high), value_axis(low, high, from_zero=True), value_axis(low, high, log=True)):
            assert axis.low < axis.high and 2 <= len(axis.ticks) <= 9


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (math.nan, "–"), (0.0, "0"), (1234567.8, "1,234,568"), (2.34567, "2.346"), (5e-9, "5.00e-09"),
     (-1500.0, "-1,500"), (0.001, "0.001"), (2e38, "2.00e+38")],
)  # fmt: skip
def test_figures_for_people(value: float | None, text: str) -> None:
    assert format_figure(value) == text


@pytest.mark.parametrize("count", [1, 7, 10, 11, 1000, 1003])
def test_condensed_curves_are_means_and_ranges_of_stretches(count: int) -> None:
    draw = np.random.default_rng(count)
    steps, values = np.arange(1, count + 1), draw.normal(size=count)
    values[draw.random(count) < 0.2] = np.nan
    xs, means, lows, highs = condense(steps, values, 10)
    assert len(xs) == min(count, 10) and xs[-1] == count
    stretches = np.array_split(values, len(xs)) if count % 10 == 0 or count < 10 else None
    start = 0
    for number, end in enumerate(xs.astype(int)):
        part = values[start:end]
        assert stretches is None or len(part) == len(stretches[number])
        start = end
        if np.isfinite(part).any():
            expected = (np.nanmean(part), np.nanmin(part), np.nanmax(part))
            assert (means[number], lows[number], highs[number]) == pytest.approx(expected)
        else:
            assert np.isnan([means[number], lows[number], highs[number]]).all()


def by_key(charts: list[Chart]) -> dict[str, Chart]:
    return {chart.key: chart for chart in charts}


def test_what_is_drawn_of_a_run(tmp_path: Path) -> None:
    steps = [step(1), step(2, grad_norm=None, skipped=True), step(3, grad_norm=100.0), step(4)]
    runs = load_runs([write_run(tmp_path / "a", steps=steps)])
    charts = by_key(build_charts(runs))
    assert list(charts) == [
        "loss", "kd_loss", "ce_loss", "kl_to_teacher", "cross_entropy", "agreement", "grad_norm", "learning_rate",
        "tokens_per_second", "memory_bytes", "step_time_1",
    ]  # fmt: skip
    (loss,) = charts["loss"].curves
    assert loss.ys is not None and loss.ys.tolist() == [record["loss"] for record in steps] and loss.lows is None
    assert loss.xs.tolist() == [1, 2, 3, 4] and charts["loss"].x.high == 8  # of the last evaluation
    (norm,) = charts["grad_norm"].curves
    assert norm.ys is not None and np.isnan(norm.ys).tolist() == [False, True, False, False]
    assert charts["grad_norm"].y.log and not charts["loss"].y.log
    (memory,) = charts["memory_bytes"].curves
    assert memory.ys is not None and memory.ys.tolist() == [3.0] * 4 and charts["memory_bytes"].unit == "GiB"
    (held_out,) = charts["cross_entropy"].curves
    assert held_out.dots and held_out.xs.tolist() == [0, 4, 8]
    layers = charts["step_time_1"].curves
    assert [curve.name for curve in layers] == list(STEP_PARTS)
    assert layers[-1].highs is not None and layers[-1].highs.tolist() == pytest.approx([sum(SECONDS.values())] * 4)
    assert [curve.told[0] for curve in layers] == list(SECONDS.values())
    assert by_key(build_charts(runs, log_loss=True))["loss"].y.log


def test_who_waits_is_drawn_where_the_teacher_has_ranks_of_its_own(tmp_path: Path) -> None:
    steps = [step(n, student_wait_share=0.1 * n, teacher_wait_share=0.5) for n in (1, 2)]
    charts = by_key(build_charts(load_runs([write_run(tmp_path / "a", steps=steps)])))
    for key, expected in (("student_wait_share", [0.1, 0.2]), ("teacher_wait_share", [0.5, 0.5])):
        (curve,) = charts[key].curves
        assert curve.ys is not None and curve.ys.tolist() == expected


def test_points_without_a_line_are_marked(tmp_path: Path) -> None:
    norms = [1.0, None, 2.0, 3.0, None, 1.0]
    steps = [step(n + 1, grad_norm=norm) for n, norm in enumerate(norms)]
    charts = by_key(build_charts(load_runs([write_run(tmp_path / "a", steps=steps, evaluations=[evaluation(4)])])))
    assert charts["grad_norm"].curves[0].lone.tolist() == [True, False, False, False, False, True]
    assert charts["kl_to_teacher"].curves[0].lone.tolist() == [True]
    assert not charts["loss"].curves[0].lone.any()
    plain, marked = tmp_path / "plain.png", tmp_path / "marked.png"
    save_chart(charts["loss"], plain)
    save_chart(charts["kl_to_teacher"], marked)
    blue = [
        np.isclose(imread(path)[..., :3], (0, 0x72 / 255, 0xB2 / 255), atol=0.02).all(-1) for path in (plain, marked)
    ]
    assert blue[0].any() and blue[1].sum() > 100  # a disk, no speck


def test_what_some_runs_lack(tmp_path: Path) -> None:
    gone = {"memory_bytes": ..., **{seconds_key(part): ... for part in STEP_PARTS}}
    old = write_run(tmp_path / "old", steps=[step(n, **gone) for n in (1, 2)], evaluations=[], step_times=[])
    alone = write_run(tmp_path / "alone", steps=[step(n, kd_loss=0.0) for n in (1, 2, 3)],
                      config={"distill__kd_weight": 0.0})  # fmt: skip
    charts = by_key(build_charts(load_runs([old, alone])))
    assert [curve.color for curve in charts["loss"].curves] == ["run-0", "run-1"]
    assert [curve.color for curve in charts["kd_loss"].curves] == ["run-0"]
    assert [curve.color for curve in charts["agreement"].curves] == ["run-1"]
    assert [curve.told[0] for curve in charts["memory_bytes"].curves] == [4.0, 3.0]  # the old one's peak
    assert "step_time_1" not in charts and "step_time_2" in charts
    everything_missing = write_run(tmp_path / "bare", steps=[{"step": 1}], evaluations=[], step_times=[])
    assert build_charts(load_runs([everything_missing])) == []


def test_a_long_run_has_few_points_and_shows_its_range() -> None:
    count = 100_000
    values = np.random.default_rng(0).normal(size=count)
    values[12_345] = 50.0
    run = RunData(Path("x"), "x", np.arange(1, count + 1), {"loss": values}, {}, [], [])
    (chart,) = build_charts([run])
    (curve,) = chart.curves
    assert curve.highs is not None and curve.lows is not None and len(curve.xs) <= 400
    assert np.nanmax(curve.highs) == 50.0 and chart.y.high >= 50.0
