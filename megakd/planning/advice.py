"""What to change where a run does not fit, or could be faster."""

from __future__ import annotations

from collections.abc import Iterator

from megakd.planning.dedicated_advice import TOGETHER, other_shares
from megakd.planning.fitting import changed, ways_to_fit
from megakd.planning.plan import Plan
from megakd.planning.splits import best_split
from megakd.planning.wording import settings_text, size_text

# A proposal must be worth reading.
_WORTHWHILE = 0.99
_OTHERWISE = "more ranks, or a teacher from a cache (`./launch.sh cache`), are needed"


def advise(plan: Plan) -> list[str]:
    """Lines with settings to change, each with what it leads to."""
    return [
        *_advice_on_memory(plan),
        *_advice_on_sides(plan),
        *_advice_on_split(plan),
        *_advice_on_optimizer(plan),
    ]


def _advice_on_memory(plan: Plan) -> Iterator[str]:
    if plan.fits:
        return
    ways = ways_to_fit(plan)
    if all(way.plan.fits and len(way.steps) == 1 for way in ways):
        yield "it fits with one of these:"
        for way in ways:
            yield f"  {settings_text(way.steps[0])}: {size_text(way.plan.peak)}, a step takes {_longer(plan, way.plan)}"
        return
    (way,) = ways
    if way.plan.fits:
        yield f"it fits with all of these, a step then takes {_longer(plan, way.plan)}:"
    elif way.steps:
        yield f"it does not fit with these either; {_OTHERWISE}:"
    else:
        yield f"no setting that was tried makes it smaller; {_OTHERWISE}"
    reached: Plan | None = plan
    for settings in way.steps:
        reached = reached and changed(reached, settings)
        yield f"  {settings_text(settings)}{f': then {size_text(reached.peak)}' if reached is not None else ''}"


def _advice_on_sides(plan: Plan) -> Iterator[str]:
    """A teacher on ranks of its own that could be ahead, or elsewhere."""
    if not plan.fits or not plan.job.is_dedicated or not plan.job.is_dense:
        return
    best = plan
    for head, choices in (("less waiting with", other_shares(plan)), ("or with both models on all ranks,", [TOGETHER])):
        told = ""
        for settings in choices:
            other = changed(plan, settings)
            if other is not None and other.fits and other.timing.seconds < best.timing.seconds * _WORTHWHILE:
                best, told = other, settings_text(settings)
        if told:
            yield f"{head} {told}: a step takes {_longer(plan, best)}"


def _advice_on_split(plan: Plan) -> Iterator[str]:
    if plan.job.student.layout.pp == 1:
        return
    found = best_split(plan.job, plan.cluster)
    if found is None:
        return
    split, better = found
    is_shorter = better.timing.seconds < plan.timing.seconds * _WORTHWHILE
    if (better.fits, is_shorter) == (True, True) or (better.fits and not plan.fits):
        stages = " ".join(map(str, better.job.student.layout.stage_layers))
        yield (
            f"the stages are better balanced with {settings_text(split.settings())} (layers {stages}): a step takes "
            f"{_longer(plan, better)}, {size_text(better.peak)}"
        )


def _advice_on_optimizer(plan: Plan) -> Iterator[str]:
    """Reduction that nothing hides is hidden by a setting."""
    settings: dict[str, object] = {"optimizer.overlap_grad_reduce": True}
    if plan.job.config.optimizer.use_distributed_optimizer:
        settings["optimizer.overlap_param_gather"] = True
    better = changed(plan, settings)
    if better is not None and better.timing.seconds < plan.timing.seconds * _WORTHWHILE:
        told = settings_text(settings)
        yield f"communication hides behind computing with {told}: a step takes {_longer(plan, better)}"


def _longer(plan: Plan, other: Plan) -> str:
    change = other.timing.seconds / plan.timing.seconds - 1
    return f"{other.timing.seconds:.3g} s ({change:+.0%})"
