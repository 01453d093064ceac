"""Every divergence on tensor-parallel ranks against its definition, and what goes wrong in other systems."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megakd.losses.divergences import DIVERGENCES, get_divergence
from tests.losses.ranks import LAYOUTS, fused, statistics_on_rank
from tests.losses.reference import Answer, Case, make_case, relative, solve, token_losses
from tests.losses.test_distillation import EXTREME_TOLERANCES, assert_close, extreme_case
from tests.losses.test_gradients import fused_loss, leaves

NAMES = sorted(DIVERGENCES)
over_layouts = pytest.mark.parametrize(("tp_size", "sequence_parallel"), LAYOUTS)
over_divergences = pytest.mark.parametrize("divergence", NAMES)

# What reaches a different branch of the code each: settings that are drawn beside every divergence.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tempered": {"temperature": 2.0},
    "kd-tempered": {"temperature": 0.5, "ce_weight": 0.0},
    "two-temperatures": {"temperature": 1.0, "teacher_temperature": 1.7, "temperature_squared": False},
    "ce-alone": {"kd_weight": 0.0},
    "parameters": {"jsd_beta": 0.15, "skew_alpha": 0.6, "temperature": 0.8, "teacher_temperature": 2.0},
    "forms": {"student_logit_scale": 1.3, "student_logit_softcap": 4.0, "teacher_logit_scale": 0.6},
    "tempered-forms": {
        "temperature": 1.5,
        "student_logit_scale": 0.5,
        "teacher_logit_softcap": 3.0,
        "student_logit_softcap": 2.5,
    },
}


# Ranks and settings meet only where figures are merged: all pairs of a few, and the rest on few layouts.
PAIRS = [
    (name, *layout) for name in SETTINGS for layout in (LAYOUTS if "tempered" in name else [(1, False), (2, True)])
]


@over_divergences
@pytest.mark.parametrize(("settings", "tp_size", "sequence_parallel"), PAIRS)
def test_float64_equals_the_definition(run_ranks, tp_size, sequence_parallel, divergence, settings):
    settings = SETTINGS[settings]
    case = make_case(21, rows=140, padded=1040, vocab_size=1027, divergence=divergence, **settings)
    assert_close(fused(run_ranks, case, tp_size, sequence_parallel), solve(case), 1e-10)


@over_layouts
@over_divergences
@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0}], ids=["plain", "tempered"])
def test_float32_equals_the_definition(run_ranks, tp_size, sequence_parallel, divergence, settings):
    case = make_case(22, rows=140, dtype=torch.float32, divergence=divergence, **settings)
    expected = solve(case)
    assert expected.kd / (case.token_weights != 0).sum() > 0.1
    assert_close(fused(run_ranks, case, tp_size, sequence_parallel), expected, 2e-6)


@over_layouts
@over_divergences
@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0}], ids=["plain", "tempered"])
def test_ranks_that_hold_only_padding(run_ranks, tp_size, sequence_parallel, divergence, settings):
    case = make_case(23, rows=140, padded=1040, vocab_size=250, divergence=divergence, dtype=torch.float32, **settings)
    actual = fused(run_ranks, case, tp_size, sequence_parallel)
    assert_close(actual, solve(case), 2e-6)
    assert actual.head_grad[250:].abs().max() == 0


def test_softcapped_ranks_that_hold_only_padding(run_ranks):
    case = make_case(24, rows=20, padded=1040, vocab_size=250, dtype=torch.float32, student_logit_softcap=5.0)
    assert_close(fused(run_ranks, case, 4, False), solve(case), 2e-6)


@over_divergences
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("tp_size", "sequence_parallel"), [(1, False), (4, True)])
def test_figures_per_token_equal_the_definition(run_ranks, tp_size, sequence_parallel, divergence, settings):
    case = make_case(25, rows=140, padded=1040, vocab_size=1027, divergence=divergence, **settings)
    kd, ce = token_losses(case, case.hidden, case.head)
    counted = case.token_weights != 0
    for actual in run_ranks(tp_size, statistics_on_rank, case, sequence_parallel):
        torch.testing.assert_close(actual.kd, kd, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(actual.ce[counted], ce[counted], rtol=1e-10, atol=1e-12)


@over_divergences
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_finite_differences(divergence, settings):
    case = make_case(
        26, rows=4, padded=9, vocab_size=7, student_width=4, teacher_width=6, divergence=divergence, **settings
    )
    assert torch.autograd.gradcheck(lambda *inputs: fused_loss(case, *inputs).total, leaves(case))


@over_divergences
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_the_gradient_is_not_multiplied_by_the_tensor_ranks(run_ranks, tp_size, divergence):
    case = make_case(27, rows=60, padded=1040, vocab_size=1027, divergence=divergence)
    actual, expected = fused(run_ranks, case, tp_size, False), solve(case)
    for name in ("hidden_grad", "head_grad"):
        ratio = getattr(actual, name).norm() / getattr(expected, name).norm()
        assert abs(ratio - 1.0) <= 1e-10


@over_divergences
@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_gradient_points_the_right_way(run_ranks, tp_size, sequence_parallel, divergence):
    case = make_case(28, rows=60, padded=1040, vocab_size=1027, divergence=divergence, ce_weight=0.0)
    actual, expected = fused(run_ranks, case, tp_size, sequence_parallel), solve(case)
    for name in ("hidden_grad", "head_grad"):
        assert _cosine(getattr(actual, name), getattr(expected, name)) >= 1.0 - 1e-12


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), dim=0)


@over_divergences
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0}], ids=["plain", "tempered"])
def test_logits_of_ten_thousand(run_ranks, tp_size, divergence, dtype, settings):
    case = dataclasses.replace(extreme_case(dtype, settings.get("temperature", 1.0)), divergence=divergence)
    assert_close(fused(run_ranks, case, tp_size, False), solve(case), EXTREME_TOLERANCES[dtype])


@over_divergences
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("offset", [-1e4, 1e4])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_offsets_of_ten_thousand_change_nothing(run_ranks, tp_size, divergence, offset, temperature):
    """Every logit of one model moves by the offset, in steps that fp32 holds exactly."""
    case = make_case(29, rows=20, padded=1040, vocab_size=1027, divergence=divergence, dtype=torch.float32)
    case = dataclasses.replace(case, temperature=temperature)
    assert case.teacher_hidden is not None and case.teacher_head is not None
    # Multiples of 2^-4 whose products are multiples of 2^-8: exact below 2^16.
    student = [torch.round(x * 16) / 16 for x in (case.hidden, case.head)]
    student[0][:, 0] = 1.0
    plain = dataclasses.replace(case, hidden=student[0], head=student[1])
    moved_head = plain.head.clone()
    moved_head[:, 0] += offset
    moved = dataclasses.replace(plain, head=moved_head)
    actual, expected = fused(run_ranks, moved, tp_size, False), fused(run_ranks, plain, tp_size, False)
    assert relative(actual.kd, expected.kd) <= 1e-5
    assert relative(actual.head_grad, expected.head_grad) <= 1e-5
    assert actual.hidden_grad.isfinite().all()


@over_divergences
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_identical_models_score_nothing_and_stay(run_ranks, tp_size, divergence, temperature):
    case = make_case(
        30,
        rows=60,
        padded=1040,
        vocab_size=1027,
        dtype=torch.float32,
        ce_weight=0.0,
        temperature=temperature,
        divergence=divergence,
    )
    case = dataclasses.replace(case, teacher_hidden=case.hidden, teacher_head=case.head)
    actual = fused(run_ranks, case, tp_size, False)
    assert actual.kd.abs() <= 1e-6 * case.token_weights.sum()
    assert actual.hidden_grad.abs().max() <= 2e-6
    assert actual.head_grad.abs().max() <= 2e-6


@over_layouts
@over_divergences
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_fully_masked_microbatch_adds_nothing(run_ranks, tp_size, sequence_parallel, divergence, softcap):
    case = make_case(31, rows=20, dtype=torch.float32, divergence=divergence, student_logit_softcap=softcap)
    case.token_weights.zero_()
    case.labels.fill_(-100)
    actual = fused(run_ranks, case, tp_size, sequence_parallel)
    for field in dataclasses.fields(Answer):
        assert getattr(actual, field.name).abs().max() == 0, field.name


def _rows(case: Case, rows: slice) -> Case:
    assert case.teacher_hidden is not None
    return dataclasses.replace(
        case,
        hidden=case.hidden[rows],
        labels=case.labels[rows],
        token_weights=case.token_weights[rows],
        teacher_hidden=case.teacher_hidden[rows],
    )


@over_divergences
@pytest.mark.parametrize(("tp_size", "sequence_parallel"), [(1, False), (4, True)])
def test_splitting_the_batch_changes_nothing(run_ranks, tp_size, sequence_parallel, divergence):
    case = make_case(32, rows=200, dtype=torch.float32, divergence=divergence)
    whole = fused(run_ranks, case, tp_size, sequence_parallel)
    splits = (slice(0, 4), slice(4, 140), slice(140, 200))
    parts = [fused(run_ranks, _rows(case, rows), tp_size, sequence_parallel) for rows in splits]
    assert relative(torch.stack([p.total for p in parts]).sum(), whole.total) <= 1e-6
    assert relative(torch.cat([p.hidden_grad for p in parts]), whole.hidden_grad) <= 1e-6
    assert relative(torch.stack([p.head_grad for p in parts]).sum(0), whole.head_grad) <= 1e-6


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match=f"divergence is 'kl'; it must be one of: {', '.join(NAMES)}"):
        get_divergence("kl")


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_jsd_at_its_ends_names_the_kls(beta):
    with pytest.raises(ValueError, match="jsd_beta is .*forward_kl.*reverse_kl"):
        get_divergence("jsd", jsd_beta=beta)
    assert get_divergence("tvd", jsd_beta=beta)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_skews_at_their_ends_name_the_kl(name, alpha):
    with pytest.raises(ValueError, match=f"skew_alpha is .* divergence {name} for 0"):
        get_divergence(f"skew_{name}", skew_alpha=alpha)


@over_divergences
@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.0])
@pytest.mark.parametrize("largest", [35.0, 41.0, 60.0, 88.0, 120.0])
def test_logits_on_both_sides_of_where_references_begin(divergence, temperature, largest):
    """Sums of exponentials are taken as they are up to a size, and relative to a reference beyond it."""
    generator = torch.Generator().manual_seed(5)
    logits, teacher = ((torch.rand(8, 400, generator=generator) * 2 - 1) * largest for _ in range(2))
    logits[:, 3], teacher[:, 7] = largest, largest
    case = dataclasses.replace(
        make_case(6, rows=8, padded=400, vocab_size=400, divergence=divergence, temperature=temperature),
        hidden=torch.eye(8),
        head=logits.T.contiguous(),
        teacher_hidden=torch.eye(8),
        teacher_head=teacher.T.contiguous(),
    )
    case = dataclasses.replace(case, token_weights=case.token_weights.float())
    hidden, head = leaves(case)
    found, expected = fused_loss(case, hidden, head), solve(case)
    found.total.backward()
    assert relative(found.total.detach(), expected.total) < 2e-6
    assert hidden.grad is not None and head.grad is not None
    assert relative(head.grad, expected.head_grad) < 2e-5
