"""Process groups of a mesh against megatron-core's own order of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

# megatron-core's names of the axes that each group spans.
AXES = {
    "tp": "tp", "cp": "cp", "pp": "pp", "dp": "dp", "dp_cp": "dp-cp", "tp_cp": "tp-cp", "mp": "tp-pp",
    "tp_dp_cp": "tp-dp-cp", "intra_dist_opt": "tp-cp-dp-pp",
}  # fmt: skip
SAME = {
    "expt_tp": "tp", "tp_ep": "tp", "tp_ep_pp": "mp", "expt_dp": "dp", "intra_expt_dp": "dp", "intra_dp_cp": "dp_cp",
}  # fmt: skip
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (4, 1, 1), (1, 4, 1), (1, 1, 2), (2, 1, 2), (1, 2, 2)]


def groups_of_rank(tp: int, pp: int, cp: int, ranks: list[int] | None) -> dict[str, Any] | None:
    """This rank's groups by name, each as its global ranks, and what the mesh says of the rank."""
    from megakd.parallel.mesh import GroupPool, build_model_mesh

    mesh = build_model_mesh(
        GroupPool(), tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp,
        ranks=ranks,
    )  # fmt: skip
    if dist.get_rank() not in mesh.ranks:
        return None
    found: dict[str, Any] = {}
    for name in [*AXES, *SAME, "ep", "embd", "pos_embd"]:
        group = getattr(mesh.groups, name)
        found[name] = None if group is None else dist.get_process_group_ranks(group)
    assert mesh.groups.inter_dist_opt is None
    found["places"] = (mesh.tp_rank, mesh.pp_rank, mesh.dp_rank, mesh.is_first_stage, mesh.is_last_stage)
    found["last_stage_rank"] = mesh.last_stage_rank
    found["sizes"] = (mesh.tp_size, mesh.pp_size, mesh.dp_size, mesh.cp_size)
    return found


def expected_groups(tp: int, pp: int, cp: int, world: int, offset: int) -> dict[int, dict[str, Any]]:
    """What megatron-core's generator lists, by rank; in a worker, where megatron-core is prepared."""
    from megatron.core.parallel_state import RankGenerator

    generator = RankGenerator(
        tp=tp, ep=1, dp=world // (tp * pp * cp), pp=pp, cp=cp, order="tp-cp-ep-dp-pp", rank_offset=offset
    )
    expected: dict[int, dict[str, Any]] = {rank: {} for rank in range(offset, offset + world)}
    for name, axes in AXES.items():
        for ranks in generator.get_ranks(axes):
            for rank in ranks:
                expected[rank][name] = sorted(ranks)
    for ranks in generator.get_ranks("pp"):
        for rank in ranks:
            ends = [ranks[0], ranks[-1]] if len(ranks) > 1 else ranks
            expected[rank]["embd"] = ends if rank in ends else None
            expected[rank]["pos_embd"] = [ranks[0]] if rank == ranks[0] else None
            expected[rank]["ep"] = [rank]
            expected[rank]["last_stage_rank"] = ranks[-1]
    for rank, groups in expected.items():
        groups.update({name: groups[same] for name, same in SAME.items()})
        groups["places"] = (
            groups["tp"].index(rank), groups["pp"].index(rank), groups["dp"].index(rank),
            groups["pp"][0] == rank, groups["pp"][-1] == rank,
        )  # fmt: skip
        groups["sizes"] = (tp, pp, world // (tp * pp * cp), cp)
    return expected


@pytest.mark.parametrize(("tp", "pp", "cp"), LAYOUTS)
def test_groups_are_those_of_megatron_core(tp: int, pp: int, cp: int, run_ranks: Callable[..., list[Any]]) -> None:
    expected = run_ranks(4, expected_groups, tp, pp, cp, 4, 0)[0]
    found = run_ranks(4, groups_of_rank, tp, pp, cp, None)
    assert found == [expected[rank] for rank in range(4)]


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (1, 1)])
def test_a_mesh_on_some_of_the_ranks(tp: int, pp: int, run_ranks: Callable[..., list[Any]]) -> None:
    expected = run_ranks(4, expected_groups, tp, pp, 1, 2, 2)[0]
    assert run_ranks(4, groups_of_rank, tp, pp, 1, [2, 3]) == [None, None, expected[2], expected[3]]


def groups_of_two_meshes() -> tuple[bool, bool]:
    from megakd.parallel.mesh import GroupPool, build_model_mesh

    pool = GroupPool()
    first = build_model_mesh(pool, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    second = build_model_mesh(pool, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    other = build_model_mesh(pool, tensor_model_parallel_size=4)
    return first.groups.tp is second.groups.tp, first.groups.mp is other.groups.tp


def test_a_pool_makes_each_group_once(run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(4, groups_of_two_meshes) == [(True, True)] * 4


def refusal(tp: int, pp: int, cp: int) -> str:
    try:
        groups_of_rank(tp, pp, cp, None)
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("tp", "pp", "cp", "words"),
    [
        (3, 1, 1, "4 ranks do not divide into TP 3 x PP 1 x CP 1 = 3"),
        (2, 4, 1, "4 ranks do not divide into TP 2 x PP 4 x CP 1 = 8"),
        (2, 2, 2, "4 ranks do not divide into TP 2 x PP 2 x CP 2 = 8"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(
    tp: int, pp: int, cp: int, words: str, run_ranks: Callable[..., list[Any]]
) -> None:
    assert run_ranks(4, refusal, tp, pp, cp) == [words] * 4
