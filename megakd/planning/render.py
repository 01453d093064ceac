"""A plan and a sweep as text."""

from __future__ import annotations

from collections.abc import Iterator

from megakd.common.text_table import text_table
from megakd.planning.advice import advise
from megakd.planning.job import Model
from megakd.planning.plan import GIB, Plan, teacher_layers
from megakd.planning.sweep import Candidate


def describe_plan(plan: Plan) -> Iterator[str]:
    """A plan's lines."""
    yield from _head(plan)
    yield ""
    yield from _memory(plan)
    yield ""
    yield from _operations(plan)
    yield ""
    yield from _transfers(plan)
    yield ""
    yield from _step(plan)
    advice = advise(plan)
    if advice:
        yield ""
        yield from advice


def describe_sweep(candidates: list[Candidate], refused: dict[str, str], top: int) -> Iterator[str]:
    """A sweep's lines: the `top` fastest layouts, what to set for the first, and what was refused."""
    rows = []
    for candidate in candidates[:top]:
        plan, layout = candidate.plan, candidate.plan.job.student.layout
        rows.append(
            [
                f"TP {layout.tp} x PP {layout.pp} x DP {layout.dp}",
                _short(layout.stage_layers),
                candidate.recompute,
                f"{plan.peak / GIB:.1f}",
                "yes" if plan.fits else "no",
                f"{plan.timing.seconds:.3g}",
                f"{plan.timing.mfu:.0%}",
                f"{plan.tokens_per_second / plan.job.world_size:,.0f}",
            ]
        )
    yield from text_table(
        ["layout", "student's layers", "recompute", "GiB", "fits", "step, s", "MFU", "tokens/s/rank"], rows
    )
    if len(candidates) > top:
        yield f"and {len(candidates) - top} more (--top)"
    if candidates and candidates[0].plan.fits:
        yield ""
        yield "the first: " + " ".join(
            f"{key}={'null' if value is None else str(value).lower()}"
            for key, value in candidates[0].settings().items()
        )
    elif candidates:
        yield ""
        yield "no layout fits on these ranks; take more nodes, or the teacher from a cache (`./launch.sh cache`)"
    if refused:
        yield ""
        yield "not possible:"
        yield from (f"  {name}: {reason}" for name, reason in refused.items())


def _short(layers: tuple[int, ...]) -> str:
    """Layers per stage, equal ones in the middle told once."""
    if len(layers) > 4 and len(set(layers[1:-1])) == 1:
        return f"{layers[0]} {len(layers) - 2}x{layers[1]} {layers[-1]}"
    return " ".join(map(str, layers))


def _head(plan: Plan) -> Iterator[str]:
    job, cluster, layout = plan.job, plan.cluster, plan.job.student.layout
    yield (
        f"{plan.num_nodes} node{'s' if plan.num_nodes > 1 else ''} of {cluster.ranks_per_node} x {cluster.device} "
        f"({cluster.name}): {job.world_size} ranks, TP {layout.tp} x PP {layout.pp} x DP {layout.dp}"
        f"{', sequence parallel' if layout.sequence_parallel else ''}"
    )
    teacher = "no teacher beside it"
    if job.teacher is not None:
        teacher = f"teacher of {_count(job.teacher)} in {_dtype(job.teacher.element_size)}"
        if job.crosses:
            own = job.teacher.layout
            teacher += f" on TP {own.tp} x PP {own.pp} x DP {own.dp}, microbatches of {job.teacher.micro_batch_size}"
    data = job.config.data
    yield (
        f"student of {_count(job.student)} parameters in "
        f"{_dtype(job.student.element_size)}, {teacher}; a step is {job.num_microbatches} microbatches of "
        f"{data.micro_batch_size} x {data.sequence_length:,} tokens on each of {layout.dp} replicas"
        f"{f', in {job.num_windows} windows' if job.num_windows > 1 else ''}"
    )


def _count(model: Model) -> str:
    count = model.architecture.num_parameters()
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _dtype(element_size: int) -> str:
    return {2: "bf16", 4: "fp32"}[element_size]


def _memory(plan: Plan) -> Iterator[str]:
    parts = list(dict.fromkeys(name for stage in plan.memory for name in stage.parts))
    unit, size_of_unit = ("GiB", GIB) if plan.peak >= GIB else ("MiB", 2.0**20)
    rows = []
    for index, stage in enumerate(plan.memory):
        layers = str(plan.job.student.layout.stage_layers[index])
        if plan.job.teacher is not None:
            layers += f"+{teacher_layers(plan.job, index)}"
        parameters = f"{stage.parameters / 1e6:,.1f}"
        if plan.job.teacher is not None:
            parameters += f"+{stage.teacher_parameters / 1e6:,.1f}"
        sizes = [f"{stage.parts.get(name, 0) / size_of_unit:.2f}" for name in parts]
        rows.append([str(index), layers, parameters, *sizes, f"{stage.peak / size_of_unit:.2f}", stage.worst])
    both = "" if plan.job.teacher is None else ": student+teacher"
    yield f"{unit} of a rank at the worst moment of a step, by pipeline stage (layers and 1e6 parameters{both})"
    yield from text_table(["stage", "layers", "parameters", *parts, "peak", "moment"], rows)
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    yield (
        f"{verdict}: at most {_bytes(plan.peak)} of {plan.capacity / GIB:.1f} GiB "
        f"({plan.cluster.memory_gib:.1f} less {plan.cluster.reserved_gib:.1f} for driver, NCCL and allocator)"
    )
    copy = plan.node_copy_bytes()
    if copy:
        yield f"a checkpoint in the making takes up to {_bytes(copy)} of a node's main memory (checkpoint.async_save)"


def _operations(plan: Plan) -> Iterator[str]:
    rows = []
    for index, (flops, seconds) in enumerate(zip(plan.flops, plan.timing.stages, strict=True)):
        row = [str(index)]
        row += [f"{getattr(flops, part) / 1e12:.3g}" for part in ("teacher", "forward", "loss", "backward")]
        row += [f"{getattr(seconds, part) * 1e3:.3g}" for part in ("teacher", "forward", "loss", "backward")]
        rows.append(row)
    yield "TFLOP and estimated milliseconds of a rank for a microbatch"
    parts = ["teacher", "forward", "loss", "backward"]
    yield from text_table(["stage", *parts, *(f"{part}, ms" for part in parts)], rows)


def _transfers(plan: Plan) -> Iterator[str]:
    if not plan.timing.transfers:
        yield "a single rank sends nothing"
        return
    rows = [
        [name, _bytes(t.link_bytes), _bytes(t.network_bytes), f"{t.calls:,.0f}", f"{t.seconds:.3g}"]
        for name, t in plan.timing.transfers.items()
    ]
    yield "sent in a step by the rank that sends most for each purpose"
    yield from text_table(["", "within node", "over network", "calls", "seconds"], rows)


def _bytes(size: float) -> str:
    return "-" if size == 0 else f"{size / 2**20:,.1f} MiB" if size < GIB else f"{size / GIB:,.2f} GiB"


def _step(plan: Plan) -> Iterator[str]:
    timing, job = plan.timing, plan.job
    yield (
        f"a step is estimated at {timing.seconds:.3g} s: teacher {timing.teacher:.3g}, student {timing.student:.3g} "
        f"(of which {timing.bubble:.3g} waiting in the pipeline), communication in the open {timing.exposed:.3g}, "
        f"optimizer {timing.optimizer:.3g}"
    )
    yield (
        f"{job.step_tokens:,} tokens per step, {plan.tokens_per_second:,.0f} per second, "
        f"{plan.tokens_per_second / job.world_size:,.0f} per second and rank; MFU {timing.mfu:.0%}"
    )
    steps, price = job.num_steps(), plan.cluster.price_per_gpu_hour
    run = ""
    if steps is not None:
        hours = steps * timing.seconds / 3600
        run = f"; the run's {steps:,} steps take {f'{hours:,.1f} hours' if hours >= 1 else f'{hours * 60:.1f} minutes'}"
        if price:
            run += f" and cost ${plan.price(steps * job.step_tokens):,.0f}"
    if price:
        yield f"${plan.price(1e9):,.2f} per billion tokens, at an assumed ${price:.2f} per GPU and hour{run}"
    elif run:
        yield run.removeprefix("; ")
    yield (
        f"assumed: products reach {plan.cluster.product_efficiency:.0%} of the peak, transfers "
        f"{plan.cluster.transfer_efficiency:.0%} of the bandwidth; evaluations, checkpoints and stalls are not counted"
    )
