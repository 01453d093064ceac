"""What a report draws, ready to be drawn in any form: curves of few points, axes, and words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.common.step_parts import STEP_PARTS, seconds_key
from megakd.report.axes import Axis, step_axis, value_axis
from megakd.report.runs import Column, RunData

# Points over all curves of a report, so that it stays below 2 MB whatever the runs' number and length.
_POINTS, _MOST_PER_CURVE, _FEWEST_PER_CURVE = 24_000, 400, 24


@dataclass(frozen=True)
class Curve:
    """A line, the range behind it, or a range alone.

    Attributes:
        color: name of a run's color (run-0) or a part's (teacher).
        xs: [n] steps.
        ys: [n] the line; None for a filled range alone.
        lows, highs: [n] the range.
        dots: each point is marked.
        figures: [n] what is told of each point where that is not `ys`.
    """

    name: str
    color: str
    xs: Column
    ys: Column | None
    lows: Column | None = None
    highs: Column | None = None
    dots: bool = False
    figures: Column | None = None

    @property
    def told(self) -> Column:
        """What is told of each point."""
        found = self.figures if self.figures is not None else self.ys
        assert found is not None
        return found

    @property
    def lone(self) -> NDArray[np.bool_]:
        """[n] the points that no line leads to or from, which would not be seen without a mark."""
        assert self.ys is not None
        finite = np.pad(np.isfinite(self.ys), 1)
        return finite[1:-1] & ~finite[:-2] & ~finite[2:]


@dataclass(frozen=True)
class Chart:
    """Curves over steps.

    Attributes:
        key: names the chart in files.
        unit: stands behind its figures.
    """

    key: str
    title: str
    caption: str
    unit: str
    x: Axis
    y: Axis
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class _Kind:
    """A chart of one key over all runs."""

    key: str
    title: str
    caption: str
    from_zero: bool = False
    is_loss: bool = False
    held_out: bool = False


_KINDS = (
    _Kind("loss", "Loss", "what is minimised, per token, nats", is_loss=True),
    _Kind("kd_loss", "Divergence from the teacher", "distill.loss in training, per token, nats", is_loss=True),
    _Kind("ce_loss", "Cross-entropy", "with the training text, per token, nats", is_loss=True),
    _Kind("kl_to_teacher", "Held out: KL to the teacher", "per token, nats", held_out=True, is_loss=True),
    _Kind("cross_entropy", "Held out: cross-entropy", "per token, nats", held_out=True, is_loss=True),
    _Kind(
        "agreement", "Held out: agreement", "share of tokens with the teacher's most probable next one", held_out=True
    ),
    _Kind("grad_norm", "Gradient norm", "before clipping"),
    _Kind("learning_rate", "Learning rate", "of the step", from_zero=True),
    _Kind("tokens_per_second", "Throughput", "tokens a second over all ranks", from_zero=True),
    _Kind("student_wait_share", "Student waits", "share of the step, for the teacher's hidden states", from_zero=True),
    _Kind("teacher_wait_share", "Teacher waits", "share of its time, for the student to come nearer", from_zero=True),
    _Kind(
        "memory_bytes", "Memory", "of the fullest rank: allocated by torch on a GPU, resident on CPU", from_zero=True
    ),
)
TIME = "step_time"
_UNITS = (("GiB", 2**30), ("MiB", 2**20))


def build_charts(runs: Sequence[RunData], *, log_loss: bool = False) -> list[Chart]:
    """Every chart that some run has figures for, and one per run of where its steps' time went.

    Args:
        log_loss: losses on logarithmic axes.
    """
    points = _POINTS // (len(runs) * (len(_KINDS) + len(STEP_PARTS)))
    points = min(max(points, _FEWEST_PER_CURVE), _MOST_PER_CURVE)
    last = max(int(run.steps[-1]) for run in runs)
    x = step_axis(max([last, *(record["step"] for run in runs for record in run.evaluations)]))
    found = [_chart(kind, runs, points, x, log_loss) for kind in _KINDS]
    charts = [chart for chart in found if chart is not None]
    return charts + [
        chart for number, run in enumerate(runs) for chart in _time_chart(number, run, len(runs), points, x)
    ]


def short_name(name: str) -> str:
    """A run's name where there is little room."""
    return name if len(name) <= 40 else f"{name[:24]}…{name[-15:]}"


def time_key(number: int) -> str:
    """The key of the chart of where a run's time went, by the run's number."""
    return f"{TIME}_{number + 1}"


def _chart(kind: _Kind, runs: Sequence[RunData], points: int, x: Axis, log_loss: bool) -> Chart | None:
    scale, unit = _unit(kind.key, runs)
    curves = []
    for number, run in enumerate(runs):
        curve = _evaluated(kind, number, run, points) if kind.held_out else _trained(kind, number, run, points, scale)
        if curve is not None:
            curves.append(curve)
    if not curves:
        return None
    values = np.concatenate([v for c in curves for v in (c.ys, c.lows, c.highs) if v is not None])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    # Norms differ by powers of ten between a run's beginning and its end.
    log = (kind.is_loss and log_loss) or (kind.key == "grad_norm" and 0 < low < high / 30)
    y = value_axis(low, high, from_zero=kind.from_zero, log=log)
    caption = f"{kind.caption}{', ' + unit if unit else ''}{'; logarithmic' if y.log else ''}"
    return Chart(kind.key, kind.title, caption, unit, x, y, tuple(curves))


def _unit(key: str, runs: Sequence[RunData]) -> tuple[float, str]:
    if key != "memory_bytes":
        return 1.0, ""
    most = max((float(np.nanmax(v)) for v in (run.column(key) for run in runs) if v is not None), default=0.0)
    unit, size = next(((name, size) for name, size in _UNITS if most >= size), _UNITS[-1])
    return float(size), unit


def _trained(kind: _Kind, number: int, run: RunData, points: int, scale: float) -> Curve | None:
    values = run.column(kind.key)
    if values is None and kind.key == "memory_bytes":
        values = run.column("peak_memory_bytes")  # what earlier versions wrote
    if values is None or (kind.key == "kd_loss" and not _has_divergence(run)):
        return None
    xs, ys, lows, highs = condense(run.steps, values / scale, points)
    color = f"run-{number}"
    if len(ys) == len(values):
        return Curve(run.label, color, xs, ys)
    return Curve(run.label, color, xs, ys, lows, highs)


def _has_divergence(run: RunData) -> bool:
    """A run on cross-entropy alone records a divergence of 0, which is none."""
    return (run.config.get("distill") or {}).get("kd_weight") != 0


def _evaluated(kind: _Kind, number: int, run: RunData, points: int) -> Curve | None:
    pairs = [(r["step"], r.get(kind.key)) for r in run.evaluations]
    pairs = [(step, float(value)) for step, value in pairs if isinstance(value, int | float)]
    if not pairs:
        return None
    steps, values = np.array([step for step, _ in pairs]), np.array([value for _, value in pairs])
    xs, ys, _, _ = condense(steps, values, points)
    return Curve(run.label, f"run-{number}", xs, ys, dots=len(ys) <= 60)


def _time_chart(number: int, run: RunData, runs: int, points: int, x: Axis) -> Iterator[Chart]:
    """Seconds by part over steps, one on top of the other."""
    columns = {part: run.column(seconds_key(part)) for part in STEP_PARTS}
    present = {part: values for part, values in columns.items() if values is not None}
    if not present:
        return
    curves, below = [], np.zeros(len(condense(run.steps, run.steps.astype(np.float64), points)[0]))
    for part, values in present.items():
        xs, ys, _, _ = condense(run.steps, values, points)
        top = below + np.nan_to_num(ys)
        curves.append(Curve(part, part, xs, None, below, top, figures=ys))
        below = top
    # One slow step, the first above all, must not press the others down.
    high = min(float(below.max()), 4 * float(np.median(below))) or 1e-6
    title = "Time of a step" if runs == 1 else f"Time of a step: {run.label}"
    y = value_axis(0.0, high, from_zero=True)
    cut = "; higher ones are cut off" if float(below.max()) > y.high else ""
    yield Chart(time_key(number), title, f"seconds, mean over ranks{cut}", "s", x, y, tuple(curves))


def condense(steps: Any, values: Column, points: int) -> tuple[Column, Column, Column, Column]:
    """At most `points` points of a curve [n]: (steps, means, lowest, highest) of stretches of equally many steps.

    A stretch without a finite value is not a number: the line is broken there.
    """
    count = len(values)
    edges = np.linspace(0, count, min(points, count) + 1).round().astype(np.int64)
    starts, sizes = edges[:-1], np.diff(edges)
    finite = np.isfinite(values)
    found = np.add.reduceat(finite, starts, dtype=np.int64)
    with np.errstate(divide="ignore", invalid="ignore"):
        means = np.add.reduceat(np.where(finite, values, 0.0), starts) / found
    lows = np.minimum.reduceat(np.where(finite, values, np.inf), starts)
    highs = np.maximum.reduceat(np.where(finite, values, -np.inf), starts)
    missing = found == 0
    lows[missing] = highs[missing] = np.nan
    # A stretch stands at its last step, so that a curve ends where its run does.
    return np.asarray(steps)[starts + sizes - 1].astype(np.float64), means, lows, highs
