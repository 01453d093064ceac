"""Settings that save memory, the cheapest in time first."""

from __future__ import annotations

from collections.abc import Iterator

from megakd.planning.dedicated_advice import dedicated_savers
from megakd.planning.job import Job, layout_settings
from megakd.planning.layout import ModelLayout
from megakd.planning.plan import Plan
from megakd.planning.splits import possible_splits

Settings = dict[str, object]
# Values of one setting, or of settings that belong together: each saves more and takes longer than the one before.
Saver = list[Settings]


def savers(plan: Plan) -> list[Saver]:
    """What may be set without another layout of the models that share ranks."""
    found = [*_free_savers(plan), _windows(plan.job), _micro_batches(plan), *_recomputation(plan)]
    if plan.job.is_dedicated:
        found += dedicated_savers(plan)
    else:
        found += [offloading(plan.job), _teacher_micro_batches(plan.job)]
    return [saver for saver in found if saver]


def _free_savers(plan: Plan) -> Iterator[Saver]:
    config, layout = plan.job.config, plan.job.student.layout
    if layout.dp > 1 and not config.optimizer.use_distributed_optimizer:
        yield [{"optimizer.use_distributed_optimizer": True}]
    if layout.tp > 1 and not config.parallel.sequence_parallel:
        yield [{"parallel.sequence_parallel": True}]
    if config.student.recompute_granularity == "none":
        yield [{"student.recompute_granularity": "selective"}]
    if plan.cluster.device_type == "cuda" and config.distill.loss_chunk_mib is None:
        yield [{"distill.loss_chunk_mib": 256}]


def _windows(job: Job) -> Saver:
    return [{"teacher.signal_window": window} for window in smaller_windows(job)]


def smaller_windows(job: Job) -> list[int]:
    """Windows below the present one, the largest first, each at most half of the one before."""
    if not job.is_dense:
        return []
    found, window = [], job.window_microbatches
    while window > 1:
        window = max(size for size in range(1, window // 2 + 1) if job.num_microbatches % size == 0)
        found.append(window)
    return found


def offloading(job: Job) -> Saver:
    """Parking the teacher in main memory, which only devices have beside theirs."""
    if job.teacher is None or job.is_dedicated or job.parks_teacher or job.device_type != "cuda":
        return []
    return [{"teacher.offload": "cpu"}]


def _micro_batches(plan: Plan) -> Saver:
    return [{"data.micro_batch_size": size} for size in halves(plan.job.config.data.micro_batch_size)]


def _teacher_micro_batches(job: Job) -> Saver:
    if job.teacher is None:
        return []
    return [{"teacher.parallel.micro_batch_size": size} for size in halves(job.teacher.micro_batch_size)]


def halves(size: int) -> Iterator[int]:
    """Half of a size, half of that, while they are whole."""
    while size > 1 and size % 2 == 0:
        size //= 2
        yield size


def _recomputation(plan: Plan) -> Iterator[Saver]:
    if plan.job.config.student.recompute_granularity != "full":
        yield [{"student.recompute_granularity": "full"}]


def other_layouts(plan: Plan) -> Iterator[Settings]:
    """The student's layout on more tensor ranks or stages, or with some of one turned into the other.

    A teacher on the same ranks goes along as far as teacher.parallel leaves it out; after that it is laid alone.
    """
    job = plan.job
    yield from (_student_layout(job, *sizes) for sizes in _sizes(job.student.layout, plan.cluster.ranks_per_node))
    if job.teacher is not None and not job.is_dedicated:
        for tp, pp in _sizes(job.teacher.layout, plan.cluster.ranks_per_node):
            yield layout_settings("teacher.parallel", tp, pp, sequence_parallel=tp > 1)


def _sizes(layout: ModelLayout, widest: int) -> Iterator[tuple[int, int]]:
    """TP and PP with the present number of ranks of a replica, or up to all of them."""
    ranks = layout.tp * layout.pp * layout.dp
    replicas = [size for size in range(layout.tp * layout.pp, ranks + 1) if ranks % size == 0]
    for replica in replicas:
        for tp in range(1, min(widest, replica) + 1):
            if replica % tp == 0 and widest % tp == 0 and (tp, replica // tp) != (layout.tp, layout.pp):
                yield tp, replica // tp


def _student_layout(job: Job, tp: int, pp: int) -> Settings:
    """Only what differs, with layers spread anew where the number of stages does."""
    layout, changed = job.student.layout, dict[str, object]()
    if tp != layout.tp:
        changed["parallel.tensor_model_parallel_size"] = tp
    if pp != layout.pp:
        changed["parallel.pipeline_model_parallel_size"] = pp
        split = next(possible_splits(job.student.architecture.num_layers, pp), None)
        told = {} if split is None else split.settings()
        has = vars(job.config.parallel)
        changed |= {key: value for key, value in told.items() if has[key.removeprefix("parallel.")] != value}
    if job.config.parallel.sequence_parallel != (tp > 1):
        changed["parallel.sequence_parallel"] = tp > 1
    return changed
