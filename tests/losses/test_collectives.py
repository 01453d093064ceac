"""What a loss sends, counted at the process group on all ranks: nothing grows with the vocabulary."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from megakd.losses import SparseSignal, chunk_rows
from megakd.losses.divergences import DIVERGENCES
from megakd.losses.signals import SPARSE_MODES
from tests.losses.ranks import fused_on_rank
from tests.losses.reference import Case, make_case
from tests.losses.sparse_reference import make_signal

COMMUNICATES = ("gather", "reduce", "scatter", "alltoall", "all_to_all", "broadcast", "send", "recv", "barrier")
ROWS, STUDENT_WIDTH, TEACHER_WIDTH = 300, 24, 40


def recorded(case: Case, sequence_parallel: bool, signal: SparseSignal | None = None) -> list[tuple[str, int]]:
    """(method of the process group, bytes of the tensors in its call) in order, on this rank."""
    calls: list[tuple[str, int]] = []

    def recording(name: str) -> Any:
        original = getattr(dist.ProcessGroup, name)

        def call(group: Any, *arguments: Any, **options: Any) -> Any:
            tensors = [x for x in tree_leaves((arguments, options)) if isinstance(x, Tensor)]
            calls.append((name, sum(x.nbytes for x in tensors)))
            return original(group, *arguments, **options)

        return mock.patch.object(dist.ProcessGroup, name, call)

    names = [n for n in dir(dist.ProcessGroup) if any(word in n for word in COMMUNICATES)]
    patches = [recording(name) for name in names]
    for patch in patches:
        patch.start()
    try:
        fused_on_rank(case, sequence_parallel, 1, signal)
    finally:
        for patch in patches:
            patch.stop()
    return calls


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("padded", [4160, 5120])
def test_one_gather_per_chunk_and_one_sum_for_mixtures(run_ranks, divergence, sequence_parallel, tp_size, padded):
    case = make_case(41, rows=ROWS, padded=padded, vocab_size=padded - 3, dtype=torch.float32, divergence=divergence)
    chunks = -(-ROWS // chunk_rows(ROWS, padded // tp_size, chunk_mib=1))
    assert chunks >= 2 or tp_size == 4
    statistics = 7 * ROWS * 4 * (1 + tp_size)
    expected = Counter(gathers=chunks, gathered=statistics)
    if sequence_parallel:
        hidden = ROWS * 4 * (STUDENT_WIDTH + TEACHER_WIDTH)
        expected.update(gathers=2, gathered=hidden + hidden // tp_size)
    if divergence not in ("forward_kl", "reverse_kl"):
        expected.update(sums=chunks, summed=2 * ROWS * 4)
    gradient = ROWS * STUDENT_WIDTH * 4
    if sequence_parallel:
        expected.update(scatters=1, scattered=gradient + gradient // tp_size)
    else:
        expected.update(sums=1, summed=gradient)
    for calls in run_ranks(tp_size, recorded, case, sequence_parallel):
        assert counted(calls) == expected


@pytest.mark.parametrize("mode", SPARSE_MODES)
@pytest.mark.parametrize("k", [1, 40])
@pytest.mark.parametrize("padded", [4160, 5120])
def test_one_gather_per_chunk_for_sparse_signals(run_ranks, mode, k, padded):
    case = make_case(42, rows=ROWS, padded=padded, vocab_size=padded - 3, dtype=torch.float32)
    chunks = -(-ROWS // chunk_rows(ROWS, padded // 2, chunk_mib=1, models=1))
    expected = Counter(gathers=chunks, gathered=8 * ROWS * 4 * 3, sums=1, summed=ROWS * STUDENT_WIDTH * 4)
    for calls in run_ranks(2, recorded, case, False, make_signal(case, mode, k)):
        assert counted(calls) == expected


def counted(calls: list[tuple[str, int]]) -> Counter[str]:
    """Calls and bytes by kind."""
    actual: Counter[str] = Counter()
    for name, size in calls:
        kind = "scatter" if "scatter" in name else "gather" if "gather" in name else "sum"
        assert kind != "sum" or name.startswith("allreduce"), name
        actual.update({f"{kind}s": 1, {"scatter": "scattered", "gather": "gathered", "sum": "summed"}[kind]: size})
    return actual
