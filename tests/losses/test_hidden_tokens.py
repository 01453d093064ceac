"""A token of weight 0 takes part in nothing, whatever stands in its row."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megakd.losses import DenseSignal, SparseSignal, distillation_loss, token_statistics
from megakd.losses.divergences import DIVERGENCES
from tests.losses.ranks import fused
from tests.losses.reference import make_case
from tests.losses.test_distillation import assert_close


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
@pytest.mark.parametrize(("tp_size", "sequence_parallel"), [(1, False), (2, True)])
def test_hidden_states_that_are_not_numbers(run_ranks, tp_size, sequence_parallel, divergence):
    case = make_case(31, rows=140, padded=1040, vocab_size=1027, divergence=divergence, temperature=2.0)
    assert case.teacher_hidden is not None
    hidden_rows = (case.token_weights == 0).nonzero().squeeze(1)
    broken, broken_teacher = case.hidden.clone(), case.teacher_hidden.clone()
    broken[hidden_rows[::2]], broken_teacher[hidden_rows[1::2]] = torch.nan, torch.inf
    damaged = dataclasses.replace(case, hidden=broken, teacher_hidden=broken_teacher)
    expected = fused(run_ranks, case, tp_size, sequence_parallel)
    actual = fused(run_ranks, damaged, tp_size, sequence_parallel)
    assert actual.hidden_grad[hidden_rows].abs().max() == 0
    assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("mode", ["sampled", "tail_bucket", "renormalised"])
def test_sparse_targets_that_are_not_numbers(mode):
    torch.manual_seed(0)
    x, head = torch.randn(4, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    ids, p = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 6]]), torch.full((4, 2), 0.5)
    entropy = torch.tensor([0.1, 0.1, torch.nan, torch.nan]) if mode == "sampled" else None
    p[2], p[3] = torch.nan, -1.0
    weights = torch.tensor([1.0, 1.0, 0.0, 0.0])
    signal = SparseSignal(ids, p, mode, entropy)
    sums = distillation_loss(
        x, head, torch.zeros(4, dtype=torch.long), weights, signal, kd_weight=1.0, ce_weight=0.5, vocab_size=50
    )
    sums.total.backward()
    kept = SparseSignal(ids[:2], p[:2], mode, None if entropy is None else entropy[:2])
    y, other = x.detach()[:2].clone().requires_grad_(), head.detach().clone().requires_grad_()
    alone = distillation_loss(
        y, other, torch.zeros(2, dtype=torch.long), weights[:2], kept, kd_weight=1.0, ce_weight=0.5, vocab_size=50
    )
    alone.total.backward()
    torch.testing.assert_close(sums.total, alone.total)
    assert x.grad is not None and y.grad is not None
    torch.testing.assert_close(x.grad, torch.cat([y.grad, torch.zeros(2, 8)]))
    torch.testing.assert_close(head.grad, other.grad)


def test_figures_per_token_are_finite():
    torch.manual_seed(0)
    x, teacher = torch.randn(3, 8), torch.randn(3, 8)
    x[1], teacher[2] = torch.nan, torch.nan
    weights, labels = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([3, -100, -100])
    signal = DenseSignal(teacher, torch.randn(50, 8))
    found = token_statistics(x, torch.randn(50, 8), labels, weights, signal, vocab_size=50)
    assert found.teacher_ce is not None
    assert torch.stack([found.kd, found.ce, found.teacher_ce]).isfinite().all()
