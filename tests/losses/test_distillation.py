"""The fused loss on tensor-parallel ranks against the definition."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.losses.ranks import LAYOUTS, fused
from tests.losses.reference import Answer, Case, make_case, relative, solve

over_layouts = pytest.mark.parametrize(("tp_size", "sequence_parallel"), LAYOUTS)
over_temperatures = pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])


def assert_close(actual: Answer, expected: Answer, tolerance: float) -> None:
    for field in dataclasses.fields(Answer):
        error = relative(getattr(actual, field.name), getattr(expected, field.name))
        assert error <= tolerance, f"{field.name}: {error}"


@over_layouts
@over_temperatures
def test_float64_equals_the_definition(run_ranks, tp_size, sequence_parallel, temperature):
    case = make_case(1, temperature=temperature)
    assert_close(fused(run_ranks, case, tp_size, sequence_parallel), solve(case), 1e-10)


@over_layouts
@over_temperatures
def test_float32_equals_the_definition(run_ranks, tp_size, sequence_parallel, temperature):
    case = make_case(2, dtype=torch.float32, temperature=temperature)
    expected = solve(case)
    assert expected.kd / (case.token_weights != 0).sum() > 0.1
    assert_close(fused(run_ranks, case, tp_size, sequence_parallel), expected, 2e-6)


@over_layouts
@pytest.mark.parametrize(
    "settings",
    [
        {"kd_weight": 1.0, "ce_weight": 0.0, "temperature": 2.0},
        {"kd_weight": 0.0, "ce_weight": 1.0},
        {"temperature": 2.0, "temperature_squared": False},
        {"with_teacher": False, "kd_weight": 0.0, "ce_weight": 1.0, "temperature": 2.0},
    ],
    ids=["kd", "ce", "without-t-squared", "no-teacher"],
)
def test_settings_mean_what_they_say(run_ranks, tp_size, sequence_parallel, settings):
    case = make_case(3, rows=140, **settings)
    assert_close(fused(run_ranks, case, tp_size, sequence_parallel), solve(case), 1e-10)


@over_layouts
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ranks_that_hold_only_padding(run_ranks, tp_size, sequence_parallel, temperature, dtype):
    case = make_case(4, vocab_size=1000, dtype=dtype, temperature=temperature)
    actual = fused(run_ranks, case, tp_size, sequence_parallel)
    assert_close(actual, solve(case), 1e-10 if dtype == torch.float64 else 2e-6)
    assert actual.head_grad[1000:].abs().max() == 0


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_one_token(run_ranks, tp_size):
    case = make_case(5, rows=1)
    assert_close(fused(run_ranks, case, tp_size, False), solve(case), 1e-10)


@over_layouts
def test_a_chunk_without_a_valid_token(run_ranks, tp_size, sequence_parallel):
    case = make_case(6)
    case.token_weights[128:256] = 0.0
    case.labels[128:256] = 10**9
    expected = solve(dataclasses.replace(case, labels=case.labels.where(case.token_weights != 0, 0)))
    actual = fused(run_ranks, case, tp_size, sequence_parallel)
    assert_close(actual, expected, 1e-10)
    assert actual.hidden_grad[128:256].abs().max() == 0


@over_layouts
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_tokens_masked(run_ranks, tp_size, sequence_parallel, temperature):
    case = make_case(7, rows=140, dtype=torch.float32, temperature=temperature)
    case.token_weights.zero_()
    case.labels.fill_(-100)
    actual = fused(run_ranks, case, tp_size, sequence_parallel)
    for field in dataclasses.fields(Answer):
        assert getattr(actual, field.name).abs().max() == 0, field.name


# Products add about a thousand equal terms there, and a matrix library that adds them one after the other, as on some
# processors, is off by 4e-6 to 6e-6.
EXTREME_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


def extreme_case(dtype: torch.dtype, temperature: float) -> Case:
    """Logits in {-1e4, ..., 1e4}, exact in any precision since each row of hidden picks one column of the head."""
    case = make_case(8, rows=140, student_width=8, teacher_width=8, dtype=dtype, temperature=temperature)
    generator = torch.Generator().manual_seed(9)
    levels = torch.tensor([-1e4, -9990.0, -3.0, 0.0, 2.0, 9995.0, 1e4, 1e4], dtype=dtype)

    def draw(shape: torch.Size) -> torch.Tensor:
        return levels[torch.randint(0, len(levels), shape, generator=generator)]

    picks = torch.eye(8, dtype=dtype)
    first, second = (torch.randint(0, 8, (140,), generator=generator) for _ in range(2))
    assert case.teacher_head is not None
    head, teacher_head = draw(case.head.shape), draw(case.teacher_head.shape)
    # In half of the columns nothing of the first two ranks' vocabulary has any mass, in the student alone.
    head[:2080, ::2] = -1e4
    return dataclasses.replace(
        case, hidden=picks[first], head=head, teacher_hidden=picks[second], teacher_head=teacher_head
    )


@over_layouts
@over_temperatures
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_of_ten_thousand(run_ranks, tp_size, sequence_parallel, temperature, dtype):
    case = extreme_case(dtype, temperature)
    assert_close(fused(run_ranks, case, tp_size, sequence_parallel), solve(case), EXTREME_TOLERANCES[dtype])


@over_layouts
@over_temperatures
def test_equal_models_score_nothing_and_move_nothing(run_ranks, tp_size, sequence_parallel, temperature):
    case = make_case(10, dtype=torch.float32, kd_weight=1.0, ce_weight=0.0, temperature=temperature)
    case = dataclasses.replace(case, teacher_hidden=case.hidden, teacher_head=case.head)
    actual = fused(run_ranks, case, tp_size, sequence_parallel)
    assert actual.kd.abs() <= 1e-6 * case.token_weights.sum()
    assert actual.hidden_grad.abs().max() <= 1e-6
    assert actual.head_grad.abs().max() <= 1e-6


@pytest.mark.parametrize(("tp_size", "sequence_parallel"), [(1, False), (2, True)])
def test_splitting_the_batch_changes_nothing(run_ranks, tp_size, sequence_parallel):
    case = make_case(11, dtype=torch.float32)
    whole = fused(run_ranks, case, tp_size, sequence_parallel)
    assert case.teacher_hidden is not None
    parts = []
    for rows in (slice(0, 2), slice(2, 100), slice(100, 300)):
        part = dataclasses.replace(
            case,
            hidden=case.hidden[rows],
            labels=case.labels[rows],
            token_weights=case.token_weights[rows],
            teacher_hidden=case.teacher_hidden[rows],
        )
        parts.append(fused(run_ranks, part, tp_size, sequence_parallel))
    assert relative(torch.stack([p.total for p in parts]).sum(), whole.total) <= 1e-6
    assert relative(torch.cat([p.hidden_grad for p in parts]), whole.hidden_grad) <= 1e-6
    assert relative(torch.stack([p.head_grad for p in parts]).sum(0), whole.head_grad) <= 1e-6
