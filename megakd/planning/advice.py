"""What to change where a run does not fit, or could be faster."""

from __future__ import annotations

from collections.abc import Iterator

from megakd.common.errors import UserError
from megakd.planning.dedicated_advice import TOGETHER, other_shares, teacher_savers
from megakd.planning.job import build_job, with_settings
from megakd.planning.plan import Plan, build_plan
from megakd.planning.splits import best_split
from megakd.planning.wording import settings_text, size_text

# A proposal must be worth reading.
_WORTHWHILE = 0.99


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
    alone, needed, reached = [], [], plan
    for settings in _savers(plan):
        single = _changed(plan, settings)
        if single is not None and single.fits:
            alone.append(f"  {settings_text(settings)}: {size_text(single.peak)}, a step takes {_longer(plan, single)}")
        if not reached.fits:
            both = _changed(reached, settings)
            if both is not None and (both.fits or _needed(both) < _needed(reached) * _WORTHWHILE):
                needed.append(f"  {settings_text(settings)}: then {size_text(both.peak)}")
                reached = both
    if alone:
        yield "it fits with one of these:"
        yield from alone
        return
    if reached.fits:
        yield f"it fits with all of these, a step then takes {_longer(plan, reached)}:"
        yield from needed
        return
    yield "it does not fit with these either; more ranks, or a teacher from a cache (`./launch.sh cache`), are needed:"
    yield from needed


def _needed(plan: Plan) -> float:
    """Bytes of the fullest rank of either side, none of which is below what there is."""
    sides = [side for side in (plan.memory, plan.teacher_memory) if side]
    return sum(max(plan.capacity, *(stage.peak for stage in side)) for side in sides)


def _savers(plan: Plan) -> Iterator[dict[str, object]]:
    """Settings that save memory, the cheapest in time first."""
    config, layout = plan.job.config, plan.job.student.layout
    parallel = config.parallel
    if layout.dp > 1 and not config.optimizer.use_distributed_optimizer:
        yield {"optimizer.use_distributed_optimizer": True}
    if layout.tp > 1 and not parallel.sequence_parallel:
        yield {"parallel.sequence_parallel": True}
    if config.student.recompute_granularity == "none":
        yield {"student.recompute_granularity": "selective"}
    if plan.cluster.device_type == "cuda" and config.distill.loss_chunk_mib is None:
        yield {"distill.loss_chunk_mib": 256}
    micro = config.data.micro_batch_size
    while micro > 1 and micro % 2 == 0:
        micro //= 2
        yield {"data.micro_batch_size": micro}
    if config.student.recompute_granularity != "full":
        yield {"student.recompute_granularity": "full"}
    for key, size in (
        ("parallel.tensor_model_parallel_size", layout.tp),
        ("parallel.pipeline_model_parallel_size", layout.pp),
    ):
        if layout.dp % 2 == 0 and not (key.startswith("parallel.tensor") and 2 * size > plan.cluster.ranks_per_node):
            more: dict[str, object] = {key: 2 * size}
            if key.startswith("parallel.tensor"):
                more["parallel.sequence_parallel"] = True
            yield more
    yield from teacher_savers(plan)


def _advice_on_sides(plan: Plan) -> Iterator[str]:
    """A teacher on ranks of its own that could be ahead, or elsewhere."""
    if not plan.fits or not plan.job.is_dedicated or not plan.job.is_dense:
        return
    best = plan
    for head, choices in (("less waiting with", other_shares(plan)), ("or with both models on all ranks,", [TOGETHER])):
        told = ""
        for settings in choices:
            other = _changed(plan, settings)
            if other is not None and other.fits and other.timing.seconds < best.timing.seconds * _WORTHWHILE:
                best, told = other, settings_text(settings)
        if told:
            yield f"{head} {told}: a step takes {_longer(plan, best)}"


def _changed(plan: Plan, settings: dict[str, object]) -> Plan | None:
    """The plan with other settings; None where a rule forbids them."""
    try:
        config = with_settings(plan.job.config, settings)
        return build_plan(build_job(config, plan.job.world_size, plan.job.device_type), plan.cluster)
    except UserError:
        return None


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
    better = _changed(plan, settings)
    if better is not None and better.timing.seconds < plan.timing.seconds * _WORTHWHILE:
        told = settings_text(settings)
        yield f"communication hides behind computing with {told}: a step takes {_longer(plan, better)}"


def _longer(plan: Plan, other: Plan) -> str:
    change = other.timing.seconds / plan.timing.seconds - 1
    return f"{other.timing.seconds:.3g} s ({change:+.0%})"
