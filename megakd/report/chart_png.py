"""The report's charts as PNG files, from the same curves and axes as the page's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megakd.common.step_parts import STEP_PARTS
from megakd.report.charts import Chart, Curve, short_name
from megakd.report.colors import PARTS, color_of, run_dash
from megakd.report.rank_times import RankTime

_INK, _SOFT, _GRID = "#1c1d1f", "#63666b", "#ececea"


def save_chart(chart: Chart, path: Path) -> None:
    """Draw a chart; OSError where it cannot be written."""
    figure, axes = _figure(4.2)
    for curve in chart.curves:
        _draw(axes, curve)
    axes.set_xlim(chart.x.low, chart.x.high)
    if chart.y.log:
        axes.set_yscale("log")
        axes.minorticks_off()
    axes.set_ylim(chart.y.low, chart.y.high)
    axes.set_xticks([tick for tick, _ in chart.x.ticks], [label for _, label in chart.x.ticks])
    axes.set_yticks([tick for tick, _ in chart.y.ticks], [label for _, label in chart.y.ticks])
    axes.set_xlabel("step", color=_SOFT)
    axes.grid(axis="y", color=_GRID)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        order = -1 if chart.curves[0].ys is None else 1  # layers as they lie
        axes.legend(
            handles[::order], labels[::order], frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1)
        )
    _save(figure, axes, chart.title, chart.caption, path)


def save_bars(runs: Sequence[tuple[str, Sequence[RankTime]]], path: Path) -> None:
    """Draw where a step's time went by rank, a bar each; OSError where it cannot be written.

    Args:
        runs: the runs that have any, by label.
    """
    bars = [
        (f"{short_name(label)}\n{time.place}" if len(runs) > 1 else time.place, time)
        for label, times in runs
        for time in times
    ]
    figure, axes = _figure(1.6 + 0.42 * len(bars))
    left = [0.0] * len(bars)
    for part in STEP_PARTS:
        widths = [time.seconds[part] for _, time in bars]
        axes.barh(range(len(bars)), widths, left=left, color=PARTS[part][0], label=part, height=0.7)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlabel("seconds", color=_SOFT)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    _save(
        figure,
        axes,
        "Where the time of a step went",
        "mean over the steps after the first, under the newest layout",
        path,
    )


def _draw(axes: Any, curve: Curve) -> None:
    color = color_of(curve.color)[0]
    if curve.ys is None:
        axes.fill_between(curve.xs, curve.lows, curve.highs, color=color, linewidth=0, label=short_name(curve.name))
        return
    if curve.lows is not None:
        axes.fill_between(curve.xs, curve.lows, curve.highs, color=color, linewidth=0, alpha=0.18)
    dash = run_dash(int(curve.color.removeprefix("run-")))
    style: Any = (0, tuple(float(length) for length in dash.split())) if dash else "-"
    axes.plot(curve.xs, curve.ys, color=color, linestyle=style, linewidth=1.6, label=short_name(curve.name),
              marker="o" if curve.dots else None, markersize=4.5, clip_on=not curve.dots)  # fmt: skip
    lone = curve.lone
    axes.plot(curve.xs[lone], curve.ys[lone], color=color, linestyle="", marker="o", markersize=8, clip_on=False)


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Any, axes: Any, title: str, caption: str, path: Path) -> None:
    axes.set_title(f"{title}\n", loc="left", fontsize=12, color=_INK, fontweight="bold", parse_math=False)
    axes.text(0, 1.03, caption, transform=axes.transAxes, fontsize=9, color=_SOFT, parse_math=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.tick_params(colors=_SOFT, length=0)
    axes.set_axisbelow(True)
    figure.savefig(path, format="png")
