"""A plan of the writing of a cache as text."""

from __future__ import annotations

from collections.abc import Iterator

from megakd.common.errors import UserError
from megakd.common.text_table import text_table
from megakd.config.layouts import teacher_section
from megakd.config.schema import Config
from megakd.planning.cache_plan import CachePlan, build_cache_plan
from megakd.planning.job import build_cache_job, layout_settings, with_settings
from megakd.planning.render import (
    assumed_line,
    count_text,
    dtype_text,
    hours_text,
    memory_unit,
    nodes_text,
    transfers_table,
    verdict_line,
)
from megakd.planning.savers import Settings, halves
from megakd.planning.wording import layout_text, settings_text, size_text
from megakd.training.teacher_cache import WINDOW

_WORTHWHILE = 1.02  # times as fast
_PROPOSALS = 5


def describe_cache_plan(plan: CachePlan, config: Config) -> Iterator[str]:
    """A plan's lines; `config` is the configuration as its user wrote it."""
    yield from _head(plan)
    yield ""
    yield from _stages(plan)
    yield ""
    yield from transfers_table(plan.transfers, "a window")
    yield ""
    yield from _time_and_size(plan)
    advice = list(_advice(plan, config))
    if advice:
        yield ""
        yield from advice


def _head(plan: CachePlan) -> Iterator[str]:
    layout, teacher = plan.teacher.layout, plan.teacher
    cut = ", sequence parallel" if layout.sequence_parallel else ""
    yield f"{nodes_text(plan.num_nodes, plan.cluster)}: {plan.job.world_size} ranks, {layout_text(layout)}{cut}"
    yield (
        f"the teacher alone, of {count_text(teacher)} in {dtype_text(teacher.element_size)}; microbatches of "
        f"{teacher.micro_batch_size} x {plan.job.sequence_length:,} tokens, {WINDOW} in a window on each "
        f"of {layout.dp} replicas"
    )


def _stages(plan: CachePlan) -> Iterator[str]:
    parts = list(dict.fromkeys(name for stage in plan.memory for name in stage.parts))
    unit, size_of_unit = memory_unit(plan.peak)
    last = len(plan.memory) - 1
    rows = []
    for index, stage in enumerate(plan.memory):
        flops = plan.stage_flops[index] + (plan.head_flops if index == last else 0.0)
        seconds = plan.stage_seconds[index] + (plan.extraction if index == last else 0.0)
        sizes = [f"{stage.parts.get(name, 0) / size_of_unit:.2f}" for name in parts]
        rows.append(
            [
                str(index), str(plan.teacher.layout.stage_layers[index]), f"{stage.teacher_parameters / 1e6:,.1f}",
                *sizes, f"{stage.peak / size_of_unit:.2f}", stage.worst, f"{flops / 1e12:.3g}", f"{seconds * 1e3:.3g}",
            ]
        )  # fmt: skip
    yield f"{unit} of a rank at the worst moment, by pipeline stage (1e6 parameters), and its work for a microbatch"
    header = ["stage", "layers", "parameters", *parts, "peak", "moment", "TFLOP", "ms"]
    yield from text_table(header, rows)
    yield verdict_line(fits=plan.fits, peak=plan.peak, cluster=plan.cluster)


def _time_and_size(plan: CachePlan) -> Iterator[str]:
    extraction = plan.extraction * WINDOW
    yield (
        f"a window of {plan.window_tokens:,} tokens is estimated at {plan.window_seconds:.3g} s, of which the head and "
        f"what is kept of it take {extraction:.3g}; {plan.tokens_per_second:,.0f} tokens per second, "
        f"{plan.tokens_per_second / plan.job.world_size:,.0f} per second and rank; MFU {plan.mfu:.0%}"
    )
    yield (
        f"at most {plan.bytes_per_token:.0f} bytes per token: fewer where the teacher is sure of itself or tokens do "
        "not count; `cache --dry-run` measures it"
    )
    tokens, price = plan.tokens, plan.cluster.price_per_gpu_hour
    of = f"the run's {tokens:,} tokens take" if tokens is not None else "a billion tokens take"
    less = "" if tokens is None else "; less where samples come up again, which are written once"
    tokens = 10**9 if tokens is None else tokens
    cost = f", cost ${plan.price(tokens):,.0f} at an assumed ${price:.2f} per GPU and hour" if price else ""
    disk = size_text(tokens * plan.bytes_per_token)
    yield f"{of} {hours_text(tokens / plan.tokens_per_second)}{cost}, and at most {disk} of disk{less}"
    yield assumed_line(plan.cluster, "reading, encoding and writing beside the teacher")


def _advice(plan: CachePlan, config: Config) -> Iterator[str]:
    """Settings with which it fits, or is faster."""
    found = []
    for layout in [{}, *_layouts(plan, config)]:
        other = _first_that_fits(plan, config, layout)
        if other is not None and (not plan.fits or other[0].tokens_per_second > plan.tokens_per_second * _WORTHWHILE):
            found.append(other)
    found.sort(key=lambda pair: -pair[0].tokens_per_second)
    if found:
        yield "it is faster with:" if plan.fits else "it fits with one of these:"
        for other_plan, settings in found[: 1 if plan.fits else _PROPOSALS]:
            change = other_plan.tokens_per_second / plan.tokens_per_second - 1
            yield f"  {settings_text(settings)}: {size_text(other_plan.peak)}, {change:+.0%} tokens per second"
    elif not plan.fits:
        yield (
            "no layout of these ranks makes it fit, with smaller microbatches and chunks either; more ranks for one "
            "teacher (--nnodes, with more of them in TP x PP) are needed"
        )


def _first_that_fits(plan: CachePlan, config: Config, layout: Settings) -> tuple[CachePlan, Settings] | None:
    """A layout with the largest microbatches and chunks with which it fits."""
    for chunk in _chunks(plan, config):
        for micro in _micro_batches(plan, config):
            settings = {**layout, **micro, **chunk}
            try:
                job = build_cache_job(with_settings(config, settings), plan.job.world_size, plan.job.device_type)
            except UserError:
                continue  # a rule forbids them
            other = build_cache_plan(job, plan.cluster)
            if other.fits:
                return other, settings
    return None


def _chunks(plan: CachePlan, config: Config) -> list[Settings]:
    is_free = config.distill.loss_chunk_mib is None and plan.cluster.device_type == "cuda"
    return [{}, {"distill.loss_chunk_mib": 256}] if is_free else [{}]


def _micro_batches(plan: CachePlan, config: Config) -> list[Settings]:
    """The present microbatches and smaller ones, under the key that decides in this configuration."""
    assert config.teacher is not None
    own = config.teacher.parallel.micro_batch_size
    key = "data.micro_batch_size" if own is None else "teacher.parallel.micro_batch_size"
    sizes = [*(size for size in halves(plan.teacher.micro_batch_size) if size > 1), 1]
    return [{}, *[Settings({key: size}) for size in sizes if size < plan.teacher.micro_batch_size]]


def _layouts(plan: CachePlan, config: Config) -> Iterator[Settings]:
    """Other layouts, under the keys that decide in this configuration."""
    section, ranks = teacher_section(config), plan.job.world_size
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    for tp in (size for size in sizes if size <= plan.cluster.ranks_per_node):
        for pp in (size for size in sizes if ranks % (tp * size) == 0):
            yield layout_settings(section, tp, pp, sequence_parallel=tp > 1)
