"""The pools of ranks answer in rank order, carry exceptions over, and survive a failure."""

from __future__ import annotations

import gc
import os
import re

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.workers import RankError


class Unpicklable(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__("two arguments")


def summed_rank(offset: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total)
    return os.getpid(), total


def make_group_in_a_circle() -> None:
    holder: list[object] = [dist.new_group([0, 1])]
    holder.append(holder)


def groups_and_threads() -> tuple[int, int]:
    return len(dist.distributed_c10d._world.pg_map), psutil.Process().num_threads()


def frozen_objects() -> int:
    return gc.get_freeze_count()


def fail_on_last_rank() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise LookupError("lost")
    dist.barrier()


def fail_with(kind: str) -> None:
    if kind == "unpicklable":
        raise Unpicklable(1, 2)
    if kind == "exit":
        os._exit(7)
    dist.barrier() if dist.get_rank() == 0 else None


def test_results_come_in_rank_order_from_the_same_processes(run_ranks):
    first, second = run_ranks(2, summed_rank, 10), run_ranks(2, summed_rank, 20)
    assert [r[1].item() for r in first] == [21, 21]
    assert [r[1].item() for r in second] == [41, 41]
    assert [r[0] for r in first] == [r[0] for r in second]
    assert len({r[0] for r in first}) == 2


def test_groups_of_a_call_end_with_it(run_ranks):
    before = run_ranks(2, groups_and_threads)
    for _ in range(3):
        run_ranks(2, make_group_in_a_circle)
    assert run_ranks(2, groups_and_threads) == before


def test_what_a_rank_begins_with_is_never_collected(run_ranks):
    """Otherwise each collection between two calls takes longer than most calls."""
    assert run_ranks(1, frozen_objects)[0] > 100_000


def test_a_rank_fails_and_the_next_call_works(run_ranks):
    with pytest.raises(LookupError, match="lost") as info:
        run_ranks(2, fail_on_last_rank)
    assert re.search(r"rank 1 of 2:(.|\n)*fail_on_last_rank", str(info.value.__cause__))
    assert run_ranks(2, summed_rank, 0)[0][1].item() == 1


@pytest.mark.parametrize(("kind", "words"), [("unpicklable", "Unpicklable: two arguments"), ("exit", "exit status 7")])
def test_failures_that_cannot_be_pickled_are_told(run_ranks, kind, words):
    with pytest.raises(RankError, match=words):
        run_ranks(1, fail_with, kind)


def test_a_hanging_rank_runs_into_the_limit(run_ranks):
    run_ranks(2, summed_rank, 0)  # both processes are up, so that only rank 0 can be late
    with pytest.raises(TimeoutError, match=r"ranks \[0\]"):
        run_ranks(2, fail_with, "hang", seconds=2.0)
