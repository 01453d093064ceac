"""Per-token figures on tensor-parallel ranks against the definition."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.losses.ranks import LAYOUTS, statistics_on_rank
from tests.losses.reference import Case, make_case, token_losses

over_layouts = pytest.mark.parametrize(("tp_size", "sequence_parallel"), LAYOUTS)


def teacher_as_student(case: Case) -> Case:
    return dataclasses.replace(case, hidden=case.teacher_hidden, head=case.teacher_head)


@over_layouts
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("vocab_size", [4099, 1000])
def test_figures_equal_the_definition(run_ranks, tp_size, sequence_parallel, temperature, vocab_size):
    case = make_case(1, vocab_size=vocab_size, temperature=temperature)
    assert case.teacher_hidden is not None and case.teacher_head is not None
    # A teacher that is the student but for noise, so that the two agree on some tokens and not on others.
    noise = torch.randn(case.hidden.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    case = dataclasses.replace(case, teacher_hidden=case.hidden + 0.3 * noise, teacher_head=case.head)
    kd, ce = token_losses(case, case.hidden, case.head)
    teacher = teacher_as_student(case)
    teacher_ce = token_losses(teacher, teacher.hidden, teacher.head)[1]
    firsts = [(c.hidden @ c.head.T[:, :vocab_size]).argmax(1) for c in (case, teacher)]
    agree = firsts[0] == firsts[1]
    assert 20 < agree.sum() < 280
    counted = case.token_weights != 0
    for actual in run_ranks(tp_size, statistics_on_rank, case, sequence_parallel):
        torch.testing.assert_close(actual.kd, kd, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(actual.ce[counted], ce[counted], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(actual.teacher_ce[counted], teacher_ce[counted], rtol=1e-10, atol=1e-12)
        assert torch.equal(actual.agree, agree)
        assert actual.ce.isfinite().all() and actual.teacher_ce.isfinite().all()


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_equal_logits_go_to_the_lowest_id(run_ranks, tp_size):
    """Student: ids 3, 5 and 30 are equally likely. Teacher: 3 and 30; 5 and 30; 19, the column of 3 on another rank."""
    case = make_case(3, rows=3, padded=32, vocab_size=32, student_width=3, teacher_width=3)
    assert case.teacher_head is not None
    case.head.zero_()
    case.teacher_head.zero_()
    case.head[[3, 5, 30]] = 1.0
    case.teacher_head[[3, 30], 0] = 1.0
    case.teacher_head[[5, 30], 1] = 1.0
    case.teacher_head[19, 2] = 1.0
    eye = torch.eye(3, dtype=torch.float64)
    case = dataclasses.replace(case, hidden=eye, teacher_hidden=eye)
    for actual in run_ranks(tp_size, statistics_on_rank, case, False):
        assert actual.agree.tolist() == [True, False, False]


def test_without_a_teacher(run_ranks):
    case = make_case(4, with_teacher=False)
    counted = case.token_weights != 0
    ce = token_losses(case, case.hidden, case.head)[1]
    for actual in run_ranks(2, statistics_on_rank, case, True):
        torch.testing.assert_close(actual.ce[counted], ce[counted], rtol=1e-10, atol=1e-12)
        assert actual.kd.abs().max() == 0
        assert actual.teacher_ce is None and actual.agree is None
