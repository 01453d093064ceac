"""Charts as HTML: curves in SVG that stretches with the page, words and figures beside it in the page's own type."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from megakd.report.axes import Axis, format_figure
from megakd.report.charts import Chart, Curve, short_name
from megakd.report.colors import run_dash
from megakd.report.rank_times import RankTime
from megakd.report.runs import Column

# Whole units of the drawing: finer than a pixel, and short.
_WIDTH, _HEIGHT = 2000, 1000
Places = NDArray[np.int64]


def chart_html(chart: Chart) -> str:
    """A figure with its title, axes, curves and newest values; stands by itself without scripts."""
    grid = "".join(f'<path class="grid" d="M0 {_down(chart.y, tick)}H{_WIDTH}"/>' for tick, _ in chart.y.ticks)
    curves = "".join(_curve_svg(chart, curve) for curve in chart.curves)
    rows = "".join(
        f'<span style="bottom:{100 * float(chart.y.place(np.array([tick]))[0]):.2f}%">{escape(label)}</span>'
        for tick, label in chart.y.ticks
    )
    columns = _step_labels(chart.x)
    # A curve that is on top of the others is told first.
    told = list(reversed(chart.curves)) if chart.curves[0].ys is None else list(chart.curves)
    values = "".join(
        f'<span class="value {escape(curve.color)}" data-curve="{chart.curves.index(curve)}"><i></i>'
        f"{escape(short_name(curve.name))} <b>{format_figure(_newest(curve.told))}</b></span>"
        for curve in told
    )
    unit = f" {chart.unit}" if chart.unit else ""
    return (
        f'<figure class="chart" id="chart-{escape(chart.key)}" data-key="{escape(chart.key)}">'
        f"<figcaption><h3>{escape(chart.title)}</h3><p>{escape(chart.caption)}</p></figcaption>"
        f'<div class="plot"><div class="y">{rows}</div>'
        f'<div class="area"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(chart.title)} over steps">{grid}{curves}</svg><div class="cursor"></div></div>'
        f'<div class="x">{columns}</div></div>'
        f'<p class="values" data-unit="{escape(unit)}"><span class="at">at the end</span>{values}</p></figure>'
    )


def _step_labels(axis: Axis) -> str:
    """Labels below the drawing; one at its right end stays inside, and where it is narrow every second one goes."""
    labels = []
    for number, (tick, label) in enumerate(axis.ticks):
        place = 100 * float(axis.place(np.array([tick]))[0])
        kinds = ["end"] * (place > 94) + ["second"] * ((len(axis.ticks) - 1 - number) % 2)
        labels.append(f'<span class="{" ".join(kinds)}" style="left:{place:.2f}%">{escape(label)}</span>')
    return "".join(labels)


def bars_html(times: Sequence[RankTime], longest: float) -> str:
    """A bar per rank, cut into parts, its length and the rank's memory; `longest` seconds fill the width."""
    bars = []
    for time in times:
        parts = "".join(
            f'<i class="{part}" style="width:{100 * seconds / longest:.3f}%" '
            f'title="{part} {_milliseconds(seconds)}, {seconds / max(time.total, 1e-12):.1%}"></i>'
            for part, seconds in time.seconds.items()
            if seconds > 0
        )
        memory = "" if time.memory_bytes is None else f"{time.memory_bytes / 2**30:.3g} GiB"
        bars.append(
            f'<div class="bar"><span class="place">{escape(time.place)}</span><span class="track">{parts}</span>'
            f'<span class="total">{_milliseconds(time.total)}</span><span class="memory">{memory}</span></div>'
        )
    return f'<div class="bars">{"".join(bars)}</div>'


def _milliseconds(seconds: float) -> str:
    return f"{format_figure(1e3 * seconds)} ms" if seconds < 10 else f"{format_figure(seconds)} s"


def _curve_svg(chart: Chart, curve: Curve) -> str:
    parts = []
    name = escape(curve.color)
    across = np.rint(chart.x.place(curve.xs) * _WIDTH).astype(np.int64)
    if curve.lows is not None and curve.highs is not None:
        kind = "range" if curve.ys is not None else "layer"
        parts.append(f'<path class="{kind} {name}" d="{_band_path(across, chart.y, curve.lows, curve.highs)}"/>')
    if curve.ys is not None:
        dash = run_dash(int(curve.color.removeprefix("run-")))
        style = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<path class="line {name}" d="{_line_path(across, chart.y, curve.ys)}"{style}/>')
        heights = _heights(chart.y, curve.ys)
        for kind, marked in (("dots", np.isfinite(curve.ys) & curve.dots & ~curve.lone), ("lone", curve.lone)):
            # Lines of no length with round ends: circles would stretch with the drawing.
            marks = "".join(f"M{x} {y}h0" for x, y in zip(across[marked], heights[marked], strict=True))
            parts.append(f'<path class="{kind} {name}" d="{marks}"/>' if marks else "")
    return "".join(parts)


def _line_path(across: Places, axis: Axis, ys: Column) -> str:
    """Pieces between values that are not numbers."""
    heights, finite = _heights(axis, ys), np.isfinite(ys)
    path, was = [], False
    for number, (x, y) in enumerate(zip(across, heights, strict=True)):
        if finite[number]:
            path.append(f"{'L' if was else 'M'}{x} {y}")
        was = bool(finite[number])
    return "".join(path)


def _band_path(across: Places, axis: Axis, lows: Column, highs: Column) -> str:
    finite = np.isfinite(lows) & np.isfinite(highs)
    xs, tops, bottoms = across[finite], _heights(axis, highs[finite]), _heights(axis, lows[finite])
    if not len(xs):
        return ""
    up = "L".join(f"{x} {y}" for x, y in zip(xs, tops, strict=True))
    back = "L".join(f"{x} {y}" for x, y in zip(xs[::-1], bottoms[::-1], strict=True))
    return f"M{up}L{back}Z"


def _heights(axis: Axis, values: Column) -> Places:
    placed = axis.place(np.where(np.isfinite(values), values, axis.low))
    return np.rint((1 - placed) * _HEIGHT).astype(np.int64)


def _down(axis: Axis, value: float) -> int:
    return int(_heights(axis, np.array([value]))[0])


def _newest(values: Column) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else None
