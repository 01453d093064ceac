"""A report as one HTML file that asks nothing of a network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any

import numpy as np

from megakd._version import __version__
from megakd.common.step_parts import STEP_PARTS
from megakd.report.chart_html import bars_html, chart_html
from megakd.report.charts import TIME, Chart, time_key
from megakd.report.colors import PARTS, run_color
from megakd.report.rank_times import layout_note, rank_times
from megakd.report.runs import Column, RunData
from megakd.report.tables import evaluations_table, parts_table, runs_table, settings_tables, swatch

# A browser that honours it refuses every request, whatever stands in the page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def report_page(runs: Sequence[RunData], charts: Sequence[Chart]) -> str:
    """The page: charts, where the time went, evaluations, settings; of any number of runs."""
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    buttons = "".join(
        f'<button type="button" class="swatch run-{number}" data-run="run-{number}" aria-pressed="true"><i></i>'
        f"{escape(run.label)}</button>"
        for number, run in enumerate(runs)
    )
    by_run = [chart for chart in charts if not chart.key.startswith(TIME)]
    notes = "".join(f'<p class="note">{escape(run.label)}: {escape(note)}</p>' for run in runs for note in run.notes)
    body = [
        f'<header><h1>{escape(title)}</h1><p class="soft">megakd {__version__}: how {_these(runs)} went</p></header>',
        notes,
        f'<nav class="legend" aria-label="Runs">{buttons}</nav>' if len(runs) > 1 else "",
        f'<h2>Runs</h2><div class="card">{runs_table(runs)}</div>',
        f'<h2>Curves</h2><div class="grid-of">{"".join(map(chart_html, by_run))}</div>{_range_note(by_run)}',
        _times(runs, [chart for chart in charts if chart.key.startswith(TIME)]),
        _evaluations(runs),
        _settings(runs),
    ]
    style = f"{_resource('page.css')}\n{_colors(len(runs))}"
    figures = json.dumps(_figures(charts), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · megakd</title>\n<style>\n{style}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + f'\n<script type="application/json" id="figures">{figures}</script>\n'
        f"<script>\n{_resource('page.js')}</script>\n</body></html>\n"
    )


def _these(runs: Sequence[RunData]) -> str:
    return "this run" if len(runs) == 1 else "these runs"


def _range_note(charts: Sequence[Chart]) -> str:
    if not any(curve.lows is not None for chart in charts for curve in chart.curves):
        return ""
    text = "Where a run has more steps than a curve has points, the line is the mean of a stretch of steps and the band"
    return f'<p class="soft" style="margin-top:10px">{text} behind it goes from the lowest to the highest.</p>'


def _times(runs: Sequence[RunData], charts: Sequence[Chart]) -> str:
    times = [rank_times(run) for run in runs]
    if not charts and not any(times):
        return ""
    legend = "".join(
        f'<span class="value {part}" title="{escape(STEP_PARTS[part])}"><i></i>{part}</span>' for part in PARTS
    )
    longest = max((time.total for of_run in times for time in of_run), default=0.0)
    cards = []
    for number, (run, of_run) in enumerate(zip(runs, times, strict=True)):
        cards += [chart_html(chart) for chart in charts if chart.key == time_key(number)]
        if of_run:
            heading = "By rank" if len(runs) == 1 else f"By rank: {escape(run.label)}"
            note = f'<p class="soft">{escape(said)}</p>' if (said := layout_note(run)) else ""
            bars = bars_html(of_run, longest)
            cards.append(f'<div class="card"><h3>{heading}</h3>{note}{bars}{parts_table(of_run)}</div>')
    meanings = "".join(f"<dt>{part}</dt><dd>{escape(meaning)}</dd>" for part, meaning in STEP_PARTS.items())
    return (
        "<h2>Where the time of a step went</h2>"
        f'<p class="values" style="margin-bottom:14px">{legend}</p>'
        f'<div class="pair">{"".join(cards)}</div>'
        f'<details><summary>What counts as what</summary><dl class="meanings">{meanings}</dl></details>'
    )


def _evaluations(runs: Sequence[RunData]) -> str:
    tables = []
    for number, run in enumerate(runs):
        heading = f"<h3>{swatch(number, run.label)}</h3>" if len(runs) > 1 else ""
        tables.append(f'<div class="card">{heading}{evaluations_table(run)}</div>')
    kind = "pair" if len(runs) > 1 else ""
    return f'<h2>Evaluations on held-out data</h2><div class="{kind}">{"".join(tables)}</div>'


def _settings(runs: Sequence[RunData]) -> str:
    if not any(run.config for run in runs):
        return ""
    different, everything = settings_tables(runs)
    if not different:
        return f'<h2>Configuration</h2><div class="card">{everything}</div>'
    return (
        f'<h2>Configuration</h2><div class="card"><h3>What differs</h3>{different}</div>'
        f'<details><summary>All settings</summary><div class="card">{everything}</div></details>'
    )


def _colors(runs: int) -> str:
    """The curves' colors on a light and a dark ground."""
    named = {f"run-{number}": run_color(number) for number in range(runs)} | PARTS
    light = "\n".join(f".{name} {{ --color: {color[0]}; }}" for name, color in named.items())
    dark = "\n".join(f".{name} {{ --color: {color[1]}; }}" for name, color in named.items())
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


def _figures(charts: Sequence[Chart]) -> dict[str, Any]:
    """What the page's script tells of the curves; steps that several have in common stand once."""
    steps: dict[bytes, int] = {}
    lists: list[list[int]] = []
    found: dict[str, list[dict[str, Any]]] = {}
    for chart in charts:
        found[chart.key] = []
        for curve in chart.curves:
            key = curve.xs.tobytes()
            if key not in steps:
                steps[key] = len(lists)
                lists.append([int(x) for x in curve.xs])
            found[chart.key].append({"x": steps[key], "y": _rounded(curve.told)})
    return {"last": charts[0].x.high if charts else 1, "steps": lists, "charts": found}


def _rounded(values: Column) -> list[float | None]:
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values]


def _resource(name: str) -> str:
    return (resources.files("megakd.report") / name).read_text(encoding="utf-8")
