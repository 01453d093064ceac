"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator

from megakd.common.text_table import text_table
from megakd.parameters.shapes import num_parameters
from megakd.planning.advice import advise
from megakd.planning.clusters import Cluster
from megakd.planning.job import Model
from megakd.planning.memory import StageMemory
from megakd.planning.plan import Plan, dedicated_layers, teacher_layers, usable_bytes
from megakd.planning.traffic import Transfer
from megakd.planning.wording import GIB, MIB, layout_text, size_text


def describe_plan(plan: Plan) -> Iterator[str]:
    """A plan's lines."""
    yield from _head(plan)
    yield ""
    yield from _memory(plan)
    yield ""
    yield from _operations(plan)
    yield ""
    yield from transfers_table(plan.timing.transfers, "a step")
    yield ""
    yield from _step(plan)
    advice = advise(plan)
    if advice:
        yield ""
        yield from advice


def _head(plan: Plan) -> Iterator[str]:
    job, cluster, layout = plan.job, plan.cluster, plan.job.student.layout
    placing = ", ".join([layout_text(layout), *(["sequence parallel"] if layout.sequence_parallel else [])])
    if job.is_dedicated and job.teacher is not None:
        placing = (
            f"the first {len(layout.ranks)} the student's ({placing}), {len(job.teacher.layout.ranks)} the teacher's"
        )
    yield f"{nodes_text(plan.num_nodes, cluster)}: {job.world_size} ranks, {placing}"
    teacher = "no teacher beside it"
    if job.teacher is not None:
        teacher = f"teacher of {count_text(job.teacher)} in {dtype_text(job.teacher.element_size)}"
        if job.crosses:
            own = job.teacher.layout
            teacher += f" on {layout_text(own)}, microbatches of {job.teacher.micro_batch_size}"
    data = job.config.data
    yield (
        f"student of {count_text(job.student)} parameters in "
        f"{dtype_text(job.student.element_size)}, {teacher}; a step is {job.num_microbatches} microbatches of "
        f"{data.micro_batch_size} x {data.sequence_length:,} tokens on each of {layout.dp} replicas"
        f"{f', in {job.num_windows} windows' if job.num_windows > 1 else ''}"
    )


def nodes_text(count: int, cluster: Cluster) -> str:
    """So many nodes of a cluster."""
    return f"{count} node{'s' if count > 1 else ''} of {cluster.ranks_per_node} x {cluster.device} ({cluster.name})"


def count_text(model: Model) -> str:
    """A model's parameters in billions or millions."""
    count = num_parameters(model.architecture)
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def dtype_text(element_size: int) -> str:
    """The type of elements of so many bytes."""
    return {2: "bf16", 4: "fp32"}[element_size]


def _memory(plan: Plan) -> Iterator[str]:
    stages = [*plan.memory, *plan.teacher_memory]
    parts = list(dict.fromkeys(name for stage in stages for name in stage.parts))
    unit, size_of_unit = memory_unit(plan.peak)

    def row(name: str, stage: StageMemory, student_layers: int, teacher_layers: int) -> list[str]:
        layers, parameters = str(student_layers), f"{stage.parameters / 1e6:,.1f}"
        if plan.job.teacher is not None:
            layers += f"+{teacher_layers}"
            parameters += f"+{stage.teacher_parameters / 1e6:,.1f}"
        sizes = [f"{stage.parts.get(name, 0) / size_of_unit:.2f}" for name in parts]
        return [name, layers, parameters, *sizes, f"{stage.peak / size_of_unit:.2f}", stage.worst]

    rows = [
        row(str(index), stage, plan.job.student.layout.stage_layers[index], teacher_layers(plan.job, index))
        for index, stage in enumerate(plan.memory)
    ]
    rows += [row(f"teacher {index}", stage, 0, layers) for index, (layers, stage) in enumerate(dedicated_layers(plan))]
    both = "" if plan.job.teacher is None else ": student+teacher"
    yield f"{unit} of a rank at the worst moment of a step, by pipeline stage (layers and 1e6 parameters{both})"
    yield from text_table(["stage", "layers", "parameters", *parts, "peak", "moment"], rows)
    yield verdict_line(fits=plan.fits, peak=plan.peak, cluster=plan.cluster)
    copy = plan.node_copy_bytes()
    if copy:
        copied = f"{size_text(copy)} of a node's main memory"
        yield f"a checkpoint in the making takes up to {copied} (checkpoint.async_save)"


def memory_unit(peak: float) -> tuple[str, float]:
    """The unit for a table of which this is the largest figure, and its bytes."""
    return ("GiB", GIB) if peak >= GIB else ("MiB", MIB)


def verdict_line(*, fits: bool, peak: float, cluster: Cluster) -> str:
    """Whether the fullest rank's tensors fit."""
    return (
        f"{'fits' if fits else 'DOES NOT FIT'}: at most {size_text(peak)} of {usable_bytes(cluster) / GIB:.1f} GiB "
        f"({cluster.memory_gib:.1f} less {cluster.reserved_gib:.1f} for driver, NCCL and allocator)"
    )


def _operations(plan: Plan) -> Iterator[str]:
    parts = ["teacher", "forward", "loss", "backward"]
    timing = plan.timing
    stages = [(str(index), *pair) for index, pair in enumerate(zip(plan.flops, timing.stages, strict=True))]
    of_teacher = zip(plan.teacher_flops, timing.teacher_stages, strict=True)
    stages += [(f"teacher {index}", *pair) for index, pair in enumerate(of_teacher)]
    rows = [
        [
            name,
            *(f"{getattr(flops, part) / 1e12:.3g}" for part in parts),
            *(f"{getattr(seconds, part) * 1e3:.3g}" for part in parts),
        ]
        for name, flops, seconds in stages
    ]
    yield "TFLOP and estimated milliseconds of a rank for a microbatch"
    yield from text_table(["stage", *parts, *(f"{part}, ms" for part in parts)], rows)


def transfers_table(transfers: dict[str, Transfer], of: str) -> Iterator[str]:
    """What is sent in `of`: a step, a window."""
    if not transfers:
        yield "a single rank sends nothing"
        return
    rows = [
        [name, size_text(t.link_bytes), size_text(t.network_bytes), f"{t.calls:,.0f}", f"{t.seconds:.3g}"]
        for name, t in transfers.items()
    ]
    yield f"sent in {of} by the rank that sends most for each purpose"
    yield from text_table(["", "within node", "over network", "calls", "seconds"], rows)


def _step(plan: Plan) -> Iterator[str]:
    timing, job = plan.timing, plan.job
    crossing = f"hidden states on their way {timing.crossing:.3g}, " if timing.crossing else ""
    yield (
        f"a step is estimated at {timing.seconds:.3g} s: teacher {timing.teacher:.3g}"
        f"{' beside the others' if timing.is_ahead else ''}, {crossing}student {timing.student:.3g} "
        f"(of which {timing.bubble:.3g} waiting in the pipeline), communication in the open {timing.exposed:.3g}, "
        f"optimizer {timing.optimizer:.3g}"
    )
    yield from _waits(plan)
    yield from _windows(plan)
    yield (
        f"{job.step_tokens:,} tokens per step, {plan.tokens_per_second:,.0f} per second, "
        f"{plan.tokens_per_second / job.world_size:,.0f} per second and rank; MFU {timing.mfu:.0%}"
    )
    steps, price = job.num_steps(), plan.cluster.price_per_gpu_hour
    run = ""
    if steps is not None:
        run = f"; the run's {steps:,} steps take {hours_text(steps * timing.seconds)}"
        if price:
            run += f" and cost ${plan.price(steps * job.step_tokens):,.0f}"
    if price:
        yield f"${plan.price(1e9):,.2f} per billion tokens, at an assumed ${price:.2f} per GPU and hour{run}"
    elif run:
        yield run.removeprefix("; ")
    yield assumed_line(plan.cluster, "evaluations, checkpoints and stalls")


def hours_text(seconds: float) -> str:
    """How long a run takes."""
    hours = seconds / 3600
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"


def assumed_line(cluster: Cluster, left_out: str) -> str:
    """What an estimate rests on, and what is not in it."""
    return (
        f"assumed: products reach {cluster.product_efficiency:.0%} of the peak, transfers "
        f"{cluster.transfer_efficiency:.0%} of the bandwidth; {left_out} are not counted"
    )


def _waits(plan: Plan) -> Iterator[str]:
    """Which side of a run with a teacher on ranks of its own has to wait."""
    timing, job = plan.timing, plan.job
    if not timing.teacher_stages or not job.is_dense or job.teacher is None:
        return
    sides = (
        ("student", timing.student_waits, job.student.layout, "teacher"),
        ("teacher", timing.teacher_waits, job.teacher.layout, "student"),
    )
    waits = [
        f"the {name}'s {len(layout.ranks)} ranks wait {seconds:.3g} s of it for the {other} "
        f"({seconds / timing.seconds:.0%})"
        for name, seconds, layout, other in sides
        if seconds > 0
    ]
    if waits:
        ahead = "" if timing.is_ahead else ", which is not ahead (teacher.prefetch_steps 0)"
        yield f"{', '.join(waits)}{ahead}"


def _windows(plan: Plan) -> Iterator[str]:
    """What the teacher's windows cost."""
    job, cost = plan.job, plan.window_cost
    if job.num_windows == 1:
        return
    windows = f"{job.num_windows} windows of {job.window_microbatches} microbatches"
    # Less than a thousandth is rounding.
    if max(cost.step, cost.student, cost.teacher) < 1e-3 * plan.timing.seconds:
        yield f"{windows} take no longer than one"
        return
    yield (
        f"{windows} cost {cost.step:.3g} s of it more than one ({cost.step / plan.timing.seconds:.1%}): pipelines run "
        f"empty after each, the student's {cost.student:.3g} s, the teacher's {cost.teacher:.3g} s"
    )
