"""Settings worth a try where a teacher has ranks of its own."""

from __future__ import annotations

from collections.abc import Iterator

from megakd.config.layouts import prefetch_steps
from megakd.planning.plan import Plan

# Shares of the ranks that are tried, the nearest to the present one.
_SHARES = 12
# Both models on all ranks.
TOGETHER: dict[str, object] = {
    "teacher.placement": "colocated", "teacher.ranks": None, "teacher.prefetch_steps": None,
}  # fmt: skip


def dedicated_savers(plan: Plan) -> Iterator[list[dict[str, object]]]:
    """Settings that save memory on the teacher's own ranks, the cheapest in time first; windows aside."""
    job = plan.job
    assert job.teacher is not None
    own, section = job.teacher.layout, "teacher.parallel"
    factor = 2
    while factor * own.pp * own.tp < job.world_size:
        # Replicas are put together first; after that it takes more ranks.
        more: dict[str, object] = {}
        if own.dp % factor:
            more["teacher.ranks"] = own.tp * own.pp * factor
        if own.tp * factor <= plan.cluster.ranks_per_node:
            size = {f"{section}.tensor_model_parallel_size": own.tp * factor, f"{section}.sequence_parallel": True}
            yield [{**size, **more}]
        yield [{f"{section}.pipeline_model_parallel_size": own.pp * factor, **more}]
        factor *= 2
    if job.is_dense and prefetch_steps(job.config) > 0:
        yield [{"teacher.prefetch_steps": 0}]


def other_shares(plan: Plan) -> Iterator[dict[str, object]]:
    """A teacher that is ahead, or on another number of the same ranks."""
    job = plan.job
    assert job.teacher is not None
    if prefetch_steps(job.config) == 0:
        yield {"teacher.prefetch_steps": 1}
    own = job.teacher.layout
    present, replica = len(own.ranks), own.tp * own.pp
    shares = [ranks for ranks in range(replica, job.world_size, replica) if ranks != present]
    for ranks in sorted(shares, key=lambda ranks: abs(ranks - present))[:_SHARES]:
        yield {"teacher.ranks": ranks}
