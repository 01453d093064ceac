"""A sweep as text."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from megakd.common.text_table import text_table
from megakd.planning.sweep import Candidate
from megakd.planning.wording import layout_text, settings_text, size_text

# Layouts that are named of those with one reason.
_NAMED = 3


def describe_sweep(candidates: list[Candidate], refused: dict[str, str], top: int) -> Iterator[str]:
    """A sweep's lines: the `top` fastest layouts, what to set for the first, and what was refused."""
    shown = candidates[:top]
    optional = {"teacher's layout": _teacher_layout, "window": _window, "offload": _offload}
    columns = [name for name, text in optional.items() if any(map(text, shown))]
    rows = []
    for candidate in shown:
        plan, layout = candidate.plan, candidate.plan.job.student.layout
        rows.append(
            [
                layout_text(layout),
                _short(layout.stage_layers),
                *(optional[name](candidate) or "-" for name in columns),
                candidate.recompute,
                size_text(plan.peak),
                "yes" if plan.fits else "no",
                f"{plan.timing.seconds:.3g}",
                f"{plan.timing.mfu:.0%}",
                f"{plan.tokens_per_second / plan.job.world_size:,.0f}",
            ]
        )
    if candidates:
        columns += ["recompute", "peak", "fits", "step, s", "MFU", "tokens/s/rank"]
        yield from text_table(["layout", "student's layers", *columns], rows)
    else:
        yield "no layout is possible on these ranks"
    if len(candidates) > top:
        yield f"and {len(candidates) - top} more (--top)"
    if candidates and candidates[0].plan.fits:
        yield ""
        yield f"the first: {settings_text(candidates[0].settings())}"
    elif candidates:
        yield ""
        yield "no layout fits on these ranks; take more nodes, or the teacher from a cache (`./launch.sh cache`)"
    if refused:
        yield ""
        yield "not possible:"
        yield from _by_reason(refused)


def _teacher_layout(candidate: Candidate) -> str:
    """Where it is the teacher's own."""
    job = candidate.plan.job
    return layout_text(job.teacher.layout) if job.teacher is not None and job.crosses else ""


def _window(candidate: Candidate) -> str:
    job = candidate.plan.job
    return str(job.window_microbatches) if job.num_windows > 1 else ""


def _offload(candidate: Candidate) -> str:
    return "cpu" if candidate.plan.job.parks_teacher else ""


def _short(layers: tuple[int, ...]) -> str:
    """Layers per stage, equal ones in the middle told once."""
    if len(layers) > 4 and len(set(layers[1:-1])) == 1:
        return f"{layers[0]} {len(layers) - 2}x{layers[1]} {layers[-1]}"
    return " ".join(map(str, layers))


def _by_reason(refused: dict[str, str]) -> Iterator[str]:
    """A line for each reason, numbers aside: the layouts that it is true of, and the first one's."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, reason in refused.items():
        groups[re.sub(r"\d+( or \d+)*", "#", reason)].append(name)
    for names in groups.values():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        yield f"  {', '.join(names[:_NAMED])}{more}: {refused[names[0]]}"
