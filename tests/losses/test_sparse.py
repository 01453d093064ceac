"""The loss against a few known ids, on tensor-parallel ranks, against its definition."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megakd.losses import SparseSignal, distillation_loss
from megakd.losses.signals import SPARSE_MODES
from tests.losses.ranks import fused, statistics_on_rank
from tests.losses.reference import Answer, Case, make_case, relative, solve
from tests.losses.sparse_reference import (
    make_signal,
    solve_sparse,
    sparse_token_losses,
    teacher_probabilities,
    without_teacher,
)
from tests.losses.test_distillation import assert_close
from tests.losses.test_gradients import leaves

over_modes = pytest.mark.parametrize("mode", SPARSE_MODES)
over_ranks = pytest.mark.parametrize(("tp_size", "sequence_parallel"), [(1, False), (2, True), (4, False)])
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "warm": {"temperature": 2.0},
    "cold": {"temperature": 0.5, "temperature_squared": False},
    "kd-alone": {"temperature": 1.7, "ce_weight": 0.0},
    "ce-alone": {"kd_weight": 0.0},
    "form": {"student_logit_scale": 1.3, "student_logit_softcap": 4.0},
    "warm-form": {"temperature": 1.5, "student_logit_scale": 0.5, "student_logit_softcap": 2.5},
}


def small_case(seed: int, **settings: Any) -> Case:
    return make_case(seed, **{"rows": 140, "padded": 1040, "vocab_size": 1027, **settings})


@over_ranks
@over_modes
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_float64_equals_the_definition(run_ranks, tp_size, sequence_parallel, mode, settings):
    case = small_case(61, **settings)
    signal = make_signal(case, mode, 12, entropy=mode == "sampled" and tp_size == 2)
    actual = fused(run_ranks, case, tp_size, sequence_parallel, signal)
    assert_close(actual, solve_sparse(case, signal), 1e-10)


@over_ranks
@over_modes
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_float32_equals_the_definition(run_ranks, tp_size, sequence_parallel, mode, temperature):
    case = make_case(62, rows=140, dtype=torch.float32, temperature=temperature)
    signal = make_signal(case, mode, 100)
    expected = solve_sparse(case, signal)
    assert expected.kd / (case.token_weights != 0).sum() > 0.1
    assert_close(fused(run_ranks, case, tp_size, sequence_parallel, signal), expected, 2e-6)


@over_modes
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0}, {"student_logit_softcap": 5.0}])
def test_ranks_that_hold_only_padding(run_ranks, tp_size, mode, settings):
    case = small_case(63, vocab_size=250, dtype=torch.float32, **settings)
    signal = make_signal(case, mode, 12)
    actual = fused(run_ranks, case, tp_size, False, signal)
    assert_close(actual, solve_sparse(case, signal), 2e-6)
    assert actual.head_grad[250:].abs().max() == 0


@over_modes
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_id_is_known(run_ranks, tp_size, mode, temperature):
    """Without an outside the tail has nowhere to go; with all probabilities the target is the dense one."""
    case = small_case(64, rows=20, padded=64, vocab_size=50, temperature=temperature)
    signal = make_signal(case, mode, 50)
    actual = fused(run_ranks, case, tp_size, False, signal)
    assert_close(actual, solve_sparse(case, signal), 1e-10)
    if mode != "sampled":
        assert_close(actual, solve(case), 1e-9)


@over_modes
@pytest.mark.parametrize("tp_size", [1, 4])
def test_figures_per_token_equal_the_definition(run_ranks, tp_size, mode):
    case = small_case(65, temperature=1.5)
    signal = make_signal(case, mode, 12)
    kd, ce = sparse_token_losses(case, signal, case.hidden, case.head)
    counted = case.token_weights != 0
    for actual in run_ranks(tp_size, statistics_on_rank, case, False, signal):
        torch.testing.assert_close(actual.kd, kd, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(actual.ce[counted], ce[counted], rtol=1e-10, atol=1e-12)
        assert actual.agree is None and actual.teacher_ce is None


def sparse_loss(case: Case, signal: SparseSignal, hidden: Tensor, head: Tensor) -> Tensor:
    settings = without_teacher(case).settings()
    return distillation_loss(hidden, head, case.labels, case.token_weights, signal, **settings).total


@over_modes
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_finite_differences(mode, settings):
    case = make_case(66, rows=4, padded=9, vocab_size=7, student_width=4, teacher_width=6, **settings)
    signal = make_signal(case, mode, 3)
    assert torch.autograd.gradcheck(lambda *inputs: sparse_loss(case, signal, *inputs), leaves(case))


def picking_case(student: Tensor) -> Case:
    """A student whose logits are the rows of `student` [n, v], exactly."""
    n, v = student.shape
    case = make_case(67, rows=n, padded=v, vocab_size=v, student_width=n, ce_weight=0.0, kd_weight=1.0)
    weights = torch.ones(n, dtype=student.dtype)
    return dataclasses.replace(case, hidden=torch.eye(n, dtype=student.dtype), head=student.T, token_weights=weights)


def test_mass_outside_the_kept_ids_is_punished(run_ranks):
    """With all its mass on ids that the teacher does not name, a student has most to learn."""
    right, wrong = torch.zeros(8), torch.zeros(8)
    right[:2], wrong[6:] = 20.0, 20.0
    signal = SparseSignal(torch.tensor([[0, 1], [0, 1]]), torch.full((2, 2), 0.45), "tail_bucket")
    for mode in SPARSE_MODES:
        p = torch.full((2, 2), 0.5 if mode == "sampled" else 0.45)
        kept = dataclasses.replace(signal, mode=mode, probabilities=p)
        case = picking_case(torch.stack([right, wrong]))
        answer = fused(run_ranks, case, 2, False, kept)
        for statistics in run_ranks(2, statistics_on_rank, case, False, kept):
            assert statistics.kd[1] > 15 > 3 > statistics.kd[0]
        # The gradient by the logits is the transposed head's gradient: towards the ids, away from where the mass is.
        assert (answer.head_grad[:2, 1] < -0.4).all()
        assert (answer.head_grad[6:, 1] > 0.4).all()
        assert_close(answer, solve_sparse(case, kept), 2e-6)


@over_modes
def test_one_id_teaches(run_ranks, mode):
    case = small_case(68, ce_weight=0.0)
    signal = make_signal(case, mode, 1)
    actual = fused(run_ranks, case, 2, True, signal)
    assert_close(actual, solve_sparse(case, signal), 1e-10)
    towards = -(actual.hidden_grad * solve(dataclasses.replace(case)).hidden_grad).sum()
    assert towards < 0 and actual.hidden_grad.norm() > 1.0


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_student_that_agrees_stays(run_ranks, tp_size):
    case = small_case(69, ce_weight=0.0, dtype=torch.float32)
    case = dataclasses.replace(case, teacher_hidden=case.hidden, teacher_head=case.head)
    actual = fused(run_ranks, case, tp_size, False, make_signal(case, "tail_bucket", 12))
    assert actual.kd.abs() <= 2e-6 * case.token_weights.sum()
    assert actual.head_grad.abs().max() <= 5e-6


@over_modes
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_offsets_of_ten_thousand_change_nothing(run_ranks, tp_size, mode, offset):
    """Every logit moves by the offset, in steps that fp32 holds exactly."""
    case = small_case(70, rows=20, dtype=torch.float32, temperature=1.7)
    hidden, head = (torch.round(x * 16) / 16 for x in (case.hidden, case.head))
    hidden[:, 0] = 1.0
    moved_head = head.clone()
    moved_head[:, 0] += offset
    plain = dataclasses.replace(case, hidden=hidden, head=head)
    signal = make_signal(plain, mode, 12)
    actual = fused(run_ranks, dataclasses.replace(plain, head=moved_head), tp_size, False, signal)
    expected = fused(run_ranks, plain, tp_size, False, signal)
    assert relative(actual.kd, expected.kd) <= 1e-5
    assert relative(actual.head_grad, expected.head_grad) <= 1e-5
    assert actual.hidden_grad.isfinite().all()


@over_ranks
@over_modes
def test_a_fully_masked_microbatch_adds_nothing(run_ranks, tp_size, sequence_parallel, mode):
    case = small_case(71, rows=20, dtype=torch.float32)
    case.token_weights.zero_()
    case.labels.fill_(-100)
    actual = fused(run_ranks, case, tp_size, sequence_parallel, make_signal(case, mode, 12))
    for field in dataclasses.fields(Answer):
        assert getattr(actual, field.name).abs().max() == 0, field.name


@over_modes
def test_rows_without_any_id_are_finite(run_ranks, mode):
    case = small_case(72, rows=20, dtype=torch.float32)
    signal = make_signal(case, mode, 5)
    signal.ids[3:9] = -1
    if mode == "sampled":
        case.token_weights[3:9] = 0.0  # no draw at all is refused where it counts
    actual = fused(run_ranks, case, 2, False, signal)
    for field in dataclasses.fields(Answer):
        assert getattr(actual, field.name).isfinite().all(), field.name


def test_draws_teach_what_the_whole_distribution_does(run_ranks):
    """The mean gradient of many draws approaches the dense one as 1 / sqrt(draws); a top-k one stays where it is."""
    case = small_case(73, rows=16, padded=64, vocab_size=60, ce_weight=0.0, kd_weight=1.0)
    dense = solve(case).head_grad
    answers = [
        fused(run_ranks, case, 1, False, make_signal(case, "sampled", 20, seed, entropy=True)) for seed in range(400)
    ]
    mean = torch.stack([a.head_grad for a in answers]).mean(0)
    one = sum(relative(a.head_grad, dense) for a in answers) / len(answers)
    assert relative(mean, dense) < 1.5 * one / len(answers) ** 0.5
    kd = torch.stack([a.kd for a in answers])
    assert abs(kd.mean() - solve(case).kd) < 4 * kd.std() / len(answers) ** 0.5
    top = fused(run_ranks, case, 1, False, make_signal(case, "renormalised", 8)).head_grad
    assert relative(top, dense) > 3 * relative(mean, dense)


def test_probabilities_that_round_above_one_leave_no_tail(run_ranks):
    case = small_case(74, rows=8, dtype=torch.float32)
    signal = make_signal(case, "tail_bucket", 4)
    signal.probabilities.mul_(1.0 / signal.probabilities.sum(1, keepdim=True)).mul_(1.0 + 1e-6)
    assert (signal.probabilities.sum(1) > 1).all()
    assert_close(fused(run_ranks, case, 2, False, signal), solve_sparse(case, signal), 2e-6)


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "mode": ({"mode": "topk"}, {}, "mode is 'topk'; it must be one of: sampled, tail_bucket, renormalised"),
    "divergence": ({}, {"divergence": "jsd"}, "divergence is 'jsd' with a sparse signal; it must be forward_kl"),
    "temperature": ({}, {"teacher_temperature": 2.0}, "no effect on a sparse signal"),
    "softcap": ({}, {"teacher_logit_softcap": 2.0}, "no effect on a sparse signal"),
    "entropy": ({"entropy": torch.ones(6)}, {}, "entropy has no effect in the mode tail_bucket"),
    "ids": ({"ids": torch.full((6, 3), 99)}, {}, "id 99 in row 0; .* below vocab_size 90"),
    "negative": ({"probabilities": torch.full((6, 3), -0.1)}, {}, "probabilities is -0.1 in row 0; .* at least 0"),
    "nan": ({"probabilities": torch.full((6, 3), torch.nan)}, {}, "probabilities is nan in row 0"),
    "above": ({"probabilities": torch.full((6, 3), 0.4)}, {}, "add up to 1.2 in row 0; they must not exceed 1"),
    "draws": ({"mode": "sampled", "probabilities": torch.full((6, 3), 0.3)}, {}, "add up to 0.9 .* Use tail_bucket"),
    "dtype": ({"ids": torch.ones(6, 3, dtype=torch.int32)}, {}, r"ids is \[6, 3\] torch.int32"),
    "rows": ({"ids": torch.ones(5, 3, dtype=torch.int64)}, {}, r"signal.ids is \[5, 3\]; it must be \[6, 3\]"),
    "slots": ({"probabilities": torch.ones(6, 2)}, {}, r"probabilities is \[6, 2\]; it must be \[6, 3\]"),
    "none": ({"ids": torch.ones(6, 0, dtype=torch.int64)}, {}, r"ids is \[6, 0\]"),
}


@pytest.mark.parametrize(("signal_change", "change", "message"), BAD.values(), ids=BAD)
def test_bad_signals_are_refused(signal_change, change, message):
    case = make_case(75, rows=6, padded=96, vocab_size=90)
    signal = dataclasses.replace(make_signal(case, "tail_bucket", 3), **signal_change)
    settings = {**without_teacher(case).settings(), **change}
    with pytest.raises(ValueError, match=message):
        distillation_loss(case.hidden, case.head, case.labels, case.token_weights, signal, **settings)


def test_reference_probabilities_add_up():
    case = make_case(76, rows=4, padded=20, vocab_size=15)
    torch.testing.assert_close(teacher_probabilities(case).sum(1), torch.ones(4, dtype=torch.float64))


@over_modes
def test_an_id_that_is_there_twice_is_refused(mode):
    signal = SparseSignal(torch.tensor([[4, 2, 7, -1, -1], [1, 3, 1, -1, 0]]), torch.full((2, 5), 0.2), mode)
    if mode == "sampled":
        signal = dataclasses.replace(
            signal, probabilities=torch.tensor([[0.4, 0.3, 0.3, 0, 0], [0.3, 0.3, 0.2, 0, 0.2]])
        )
    with pytest.raises(ValueError, match="id 1 is there twice in row 1; ids must be distinct"):
        distillation_loss(
            torch.zeros(2, 3), torch.zeros(9, 3), torch.zeros(2, dtype=torch.int64), torch.ones(2), signal,
            kd_weight=1.0, ce_weight=0.0, vocab_size=9,
        )  # fmt: skip
