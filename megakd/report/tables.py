"""The tables of a report: what became of the runs, their evaluations, their steps' time, their settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from megakd.common.step_parts import STEP_PARTS
from megakd.report.axes import format_figure
from megakd.report.rank_times import RankTime, mean_of
from megakd.report.records import SCORES
from megakd.report.runs import RunData

_ABSENT = "–"
_MOST_EVALUATIONS = 60


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, classes: Sequence[str] = (), name: str = "") -> str:
    """A table that scrolls by itself where the page is narrow; cells are HTML, the first of a row is its heading."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr class="{classes[number] if classes else ""}"><th scope="row">{row[0]}</th>'
        + "".join(f"<td>{cell}</td>" for cell in row[1:])
        + "</tr>"
        for number, row in enumerate(rows)
    )
    return f'<div class="scroll"><table class="{name}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def swatch(number: int, label: str) -> str:
    """A run's color and label."""
    return f'<span class="swatch run-{number}"><i></i>{escape(label)}</span>'


def runs_table(runs: Sequence[RunData]) -> str:
    """A column per run: how far it came, its newest and best figures, and where it ran."""
    facts = [dict(_facts(run)) for run in runs]
    keys = dict.fromkeys(key for found in facts for key in found)
    rows = [[escape(key), *(escape(found.get(key, _ABSENT)) for found in facts)] for key in keys]
    return table(["", *(swatch(n, run.label) for n, run in enumerate(runs))], rows, name="facts")


def _facts(run: RunData) -> Iterator[tuple[str, str]]:
    last, planned = int(run.steps[-1]), run.planned_steps
    if planned is None:
        yield "steps", f"{last:,}"
    else:
        yield "steps", f"{last:,} of {planned:,}" + ("" if last >= planned else ", not finished")
    for key, title in (
        ("tokens", "tokens counted"),
        ("loss", "loss at the end"),
        ("ce_loss", "cross-entropy at the end"),
    ):
        yield title, format_figure(run.last(key))
    metric = best_metric(run)
    scored = [record for record in run.evaluations if isinstance(record.get(metric), int | float)]
    if scored:
        title = f"held-out {SCORES.get(metric, metric)}"
        best = scored[_best(scored, metric)]
        yield f"{title}, final", format_figure(scored[-1][metric])
        yield f"{title}, best", f"{format_figure(best[metric])} at step {best['step']:,}"
    for key, title in (("tokens_per_second", "tokens/s, median"), ("tflops_per_rank", "TFLOP/s per rank, median")):
        values = run.column(key)
        if values is not None:
            yield title, format_figure(float(np.nanmedian(values)))
    peak = run.column("peak_memory_bytes")
    if peak is not None:
        yield "peak memory", f"{np.nanmax(peak) / 2**30:.3g} GiB"
    for event, title in (("skipped", "skipped steps"), ("loss_spike", "loss spikes")):
        yield title, _told_steps(run.events[event])
    packages = run.description.get("packages")
    packages = packages if isinstance(packages, Mapping) else {}
    for title, value in (
        ("layout", run.description.get("layout")),
        ("teacher's layout", run.description.get("teacher_layout")),
        ("ranks", run.description.get("world_size")),
        ("torch", packages.get("torch")),
        ("megatron-core", packages.get("megatron-core")),
        ("Python", run.description.get("python")),
        ("machine", run.description.get("machine")),
        ("git revision", run.description.get("git_revision")),
        ("folder", run.folder),
    ):
        if value is not None:
            yield title, str(value)


def _told_steps(steps: Sequence[int]) -> str:
    if not steps:
        return "0"
    shown = ", ".join(f"{step:,}" for step in steps[:6])
    return f"{len(steps):,} ({shown}{', …' if len(steps) > 6 else ''})"


def best_metric(run: RunData) -> str:
    """What a run's evaluations are compared by: evaluation.metric, or the KL to the teacher, or the cross-entropy."""
    metric = (run.config.get("evaluation") or {}).get("metric")
    if isinstance(metric, str) and metric in SCORES:
        return metric
    has_teacher = any(isinstance(record.get("kl_to_teacher"), int | float) for record in run.evaluations)
    return "kl_to_teacher" if has_teacher else "cross_entropy"


def _best(records: Sequence[Mapping[str, Any]], metric: str) -> int:
    sign = -1 if metric == "agreement" else 1
    return min(range(len(records)), key=lambda number: sign * records[number][metric])


def evaluations_table(run: RunData) -> str:
    """A row per evaluation, the best one and the last one marked; of very many the newest."""
    records = run.evaluations
    keys = [key for key in SCORES if any(isinstance(record.get(key), int | float) for record in records)]
    if not keys:
        return '<p class="none">No evaluations.</p>'
    metric = best_metric(run)
    scored = [number for number, record in enumerate(records) if isinstance(record.get(metric), int | float)]
    best = scored[_best([records[number] for number in scored], metric)] if scored else None
    shown = [n for n in range(len(records)) if n >= len(records) - _MOST_EVALUATIONS or n in (0, best)]
    rows, classes = [], []
    for number in shown:
        record = records[number]
        marks = [word for word, at in (("best", best), ("final", len(records) - 1)) if number == at]
        step = f"{record['step']:,}" + "".join(f' <em class="mark">{word}</em>' for word in marks)
        rows.append([step, *(_figure(record.get(key)) for key in keys)])
        classes.append("best" if "best" in marks else "")
    left = len(records) - len(shown)
    note = f'<p class="none">{left:,} older evaluations are in evaluations.jsonl.</p>' if left else ""
    return table(["step", *(escape(SCORES[key]) for key in keys)], rows, classes=classes, name="figures") + note


def _figure(value: object) -> str:
    return format_figure(float(value)) if isinstance(value, int | float) else _ABSENT


def parts_table(times: Sequence[RankTime]) -> str:
    """A row per part: milliseconds and share, and what it is on the ranks with least and most of it."""
    means = mean_of(times)
    total = sum(means.values()) or 1.0
    rows = []
    for part, meaning in STEP_PARTS.items():
        of_ranks = [time.seconds[part] for time in times]
        rows.append([
            f'<span class="swatch {part}" title="{escape(meaning)}"><i></i>{part}</span>',
            format_figure(1e3 * means[part]), f"{means[part] / total:.1%}",
            format_figure(1e3 * min(of_ranks)), format_figure(1e3 * max(of_ranks)),
        ])  # fmt: skip
    return table(["part", "mean, ms", "share", "least, ms", "most, ms"], rows, name="figures")


def settings_tables(runs: Sequence[RunData]) -> tuple[str, str]:
    """(settings that differ between the runs, all settings with those marked); the first is "" for one run."""
    flat = [dict(_flatten(run.config)) for run in runs]
    keys = list(dict.fromkeys(key for found in flat for key in found))
    # A key that only some of the versions have stands with its section.
    sections = list(dict.fromkeys(key.split(".")[0] for key in keys))
    keys = sorted(keys, key=lambda key: sections.index(key.split(".")[0]))
    cells = {key: [_shown(found.get(key, _ABSENT)) for found in flat] for key in keys}
    different = [key for key in keys if len(set(cells[key])) > 1]
    head = ["setting", *(swatch(n, run.label) for n, run in enumerate(runs))]
    rows = {key: [f"<code>{escape(key)}</code>", *(escape(cell) for cell in cells[key])] for key in keys}
    everything = table(
        head,
        [rows[key] for key in keys],
        classes=["differs" if key in different else "" for key in keys],
        name="settings",
    )
    if len(runs) == 1:
        return "", everything
    if not different:
        return '<p class="none">No setting differs.</p>', everything
    return table(head, [rows[key] for key in different], name="settings"), everything


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, entry in value.items():
        name = f"{prefix}{key}"
        if isinstance(entry, Mapping) and entry:
            yield from _flatten(entry, f"{name}.")
        else:
            yield name, entry


def _shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(_shown(entry) for entry in value) or "[]"
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {_shown(entry)}" for key, entry in value.items()) or "{}"
    return str(value)
