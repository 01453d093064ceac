"""No tensor of the size of the logits exists while the loss runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megakd.losses import chunk_rows
from tests.losses.ranks import fused_on_rank, statistics_on_rank
from tests.losses.reference import Case, make_case, token_losses

ROWS, VOCABULARY = 1024, 4096


class LargestOutput(TorchDispatchMode):
    """Elements of the largest tensor that any operation allocated; views and results written in place are not."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **kwargs)
        for output in tree_leaves(result):
            if isinstance(output, torch.Tensor) and output.untyped_storage().data_ptr() not in known:
                self.elements = max(self.elements, output.untyped_storage().nbytes() // output.element_size())
        return result


def largest_of_loss(case: Case, sequence_parallel: bool) -> int:
    with LargestOutput() as largest:
        fused_on_rank(case, sequence_parallel)
    return largest.elements


def largest_of_statistics(case: Case, sequence_parallel: bool) -> int:
    with LargestOutput() as largest:
        statistics_on_rank(case, sequence_parallel)
    return largest.elements


@pytest.mark.parametrize("measure", [largest_of_loss, largest_of_statistics])
@pytest.mark.parametrize(("tp_size", "sequence_parallel"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_nothing_is_half_as_large_as_the_logits(run_ranks, measure, tp_size, sequence_parallel, temperature):
    case = make_case(
        1, rows=ROWS, padded=VOCABULARY, vocab_size=VOCABULARY - 5, dtype=torch.float32, temperature=temperature
    )
    assert ROWS // chunk_rows(ROWS, VOCABULARY // tp_size, chunk_mib=1) >= 8
    for elements in run_ranks(tp_size, measure, case, sequence_parallel):
        assert 0 < elements < ROWS * VOCABULARY // (2 * tp_size)


def test_the_measure_sees_whole_logits():
    case = make_case(1, rows=ROWS, padded=VOCABULARY, vocab_size=VOCABULARY, dtype=torch.float32)
    with LargestOutput() as largest:
        token_losses(case, case.hidden.double(), case.head.double())
    assert largest.elements == ROWS * VOCABULARY
