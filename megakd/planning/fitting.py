"""The search for settings with which a run fits."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest

from megakd.common.errors import UserError
from megakd.planning.job import build_job, with_settings
from megakd.planning.plan import Plan, build_plan
from megakd.planning.savers import Saver, Settings, other_layouts, savers

# Less than this part is rounding.
_ROUNDING = 1 - 1e-9
# Of a run that does not fit anyway: what a setting must save to be told.
_TOLD = 1.01
# Other layouts that are told, the fastest.
_LAYOUTS = 3


@dataclass(frozen=True)
class Way:
    """Settings, one after the other, and the plan with all of them."""

    steps: list[Settings]
    plan: Plan


def changed(plan: Plan, settings: Settings) -> Plan | None:
    """The plan with other settings; None where a rule forbids them."""
    try:
        config = with_settings(plan.job.config, settings)
        return build_plan(build_job(config, plan.job.world_size, plan.job.device_type), plan.cluster)
    except UserError:
        return None


def ways_to_fit(plan: Plan) -> list[Way]:
    """Single settings with which a plan fits; where there are none, several together, or other layouts.

    Of what no setting makes fit, the way that comes nearest alone, which may be one of no steps.
    """
    single = [_first_that_fits(plan, saver) for saver in savers(plan)]
    here = _saving(Way([], plan))
    found = [way for way in single if way is not None] or ([here] if here.plan.fits else [])
    if found:
        return found
    moved = [Way([settings], other) for settings in other_layouts(plan) if (other := changed(plan, settings))]
    layouts = [way for way in moved if way.plan.fits]
    if layouts:
        return sorted(layouts, key=lambda way: way.plan.timing.seconds)[:_LAYOUTS]
    ways = [_saving(way) for way in moved]
    fitting = [way for way in ways if way.plan.fits]
    if fitting:
        return [min(fitting, key=lambda way: way.plan.timing.seconds)]
    return [min([here, *ways], key=lambda way: way.plan.peak)]


def _first_that_fits(plan: Plan, saver: Saver) -> Way | None:
    for settings in saver:
        other = changed(plan, settings)
        if other is not None and other.fits:
            return Way([settings], other)
    return None


def _saving(way: Way) -> Way:
    """A way with savers that bring a run nearer to fitting, until it does; none that it fits without.

    The faster one of two: each saver as far as it goes before the next, and all of them a little before any goes on.
    """
    found = savers(way.plan)
    in_turn = [settings for saver in found for settings in saver]
    in_rounds = [settings for values in zip_longest(*found) for settings in values if settings is not None]
    ways = [_nearer(way, tries) for tries in (in_turn, in_rounds)]
    return min(ways, key=lambda each: (not each.plan.fits, each.plan.timing.seconds))


def _nearer(way: Way, tries: list[Settings]) -> Way:
    plan, taken = way.plan, list[Settings]()
    has_helped = True
    while has_helped and not plan.fits:
        has_helped = False
        for settings in tries:
            other = None if plan.fits or settings in taken else changed(plan, settings)
            if other is not None and _is_nearer(other, plan):
                taken = [step for step in taken if step.keys() != settings.keys()] + [settings]
                plan, has_helped = other, True
    return _fewer(way, taken, plan)


def _fewer(way: Way, taken: list[Settings], plan: Plan) -> Way:
    """The settings that are needed for what `plan`, with all of them, comes to; what takes most time goes first."""
    values, least = savers(way.plan), _needed(plan)
    while True:
        others = []
        for place, settings in enumerate(taken):
            saver = next((saver for saver in values if settings in saver), [settings])
            milder = [[value] for value in saver[: saver.index(settings)]]
            for instead in [[], *milder]:
                steps = [*taken[:place], *instead, *taken[place + 1 :]]
                other = changed(way.plan, _joined(steps))
                if other is not None and (other.fits or (not plan.fits and _needed(other) <= least * _TOLD)):
                    others.append((steps, other))
                    break
        if not others:
            return Way([*way.steps, *taken], plan)
        taken, plan = min(others, key=lambda pair: pair[1].timing.seconds)


def _joined(steps: list[Settings]) -> Settings:
    return {key: value for step in steps for key, value in step.items()}


def _is_nearer(plan: Plan, than: Plan) -> bool:
    """Whether the fullest ranks hold no more and they or others, at some moment, hold less of what is too much."""
    before, after = _needed(than), _needed(plan)
    return plan.fits or after < before * _ROUNDING or (after <= before and _excess(plan) < _excess(than) * _ROUNDING)


def _needed(plan: Plan) -> float:
    """Bytes of the fullest rank of either side, none of which is below what there is."""
    sides = [side for side in (plan.memory, plan.teacher_memory) if side]
    return sum(max(plan.capacity, *(stage.peak for stage in side)) for side in sides)


def _excess(plan: Plan) -> float:
    """Bytes beyond what there is, over all stages and moments."""
    held = [
        sum(stage.resident.values()) + sum(moment.values())
        for stage in (*plan.memory, *plan.teacher_memory)
        for moment in stage.moments.values()
    ]
    return sum(max(0.0, size - plan.capacity) for size in held)
