"""What a loss refuses, and in which words."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megakd.losses import DenseSignal, distillation_loss, token_statistics

GOOD: dict[str, Any] = {"kd_weight": 1.0, "ce_weight": 1.0, "vocab_size": 18}


def call(label: int = 1, weight: float = 1.0, **changes: Any) -> Any:
    arguments = {
        "student_hidden": torch.zeros(3, 4),
        "student_head": torch.zeros(20, 4),
        "labels": torch.tensor([0, label, 2]),
        "token_weights": torch.tensor([1.0, weight, 1.0]),
        "signal": DenseSignal(torch.zeros(3, 6), torch.zeros(20, 6)),
        **GOOD,
        **changes,
    }
    return distillation_loss(**arguments)


def test_the_unchanged_call_works():
    assert call().num_tokens == call().weight_sum == 3


@pytest.mark.parametrize("label", [18, 19, 20, -1, -100])
def test_a_label_outside_the_vocabulary_is_named(label):
    with pytest.raises(ValueError, match=rf"label {label} in row 1: .*below vocab_size 18"):
        call(label)
    assert call(label, weight=0.0).total.isfinite()


def test_token_statistics_refuse_it_too():
    signal = DenseSignal(torch.zeros(1, 6), torch.zeros(20, 6))
    with pytest.raises(ValueError, match="label 18 in row 0"):
        token_statistics(
            torch.zeros(1, 4), torch.zeros(20, 4), torch.tensor([18]), torch.ones(1), signal, vocab_size=18
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"divergence": "fwd_kl"}, "divergence is 'fwd_kl'; it must be one of: forward_kl, jsd, reverse_kl"),
        ({"temperature": 0.0}, r"temperature is 0\.0; it must be > 0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"vocab_size": 21}, "vocab_size is 21, but the heads have 1 x 20 rows"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"signal": None}, r"kd_weight is 1\.0 without a teacher signal"),
        ({"chunk_mib": 0}, "chunk_mib is 0"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"token_weights is \[3\]; it must be \[2\]"),
        ({"student_hidden": torch.zeros(3, 5)}, r"student_hidden is \[3, 5\]; it must be \[3, 4\]"),
        (
            {"student_hidden": torch.zeros(3, 4).double()},
            "student_hidden is torch.float64 and student_head torch.float32",
        ),
        ({"main_grad": torch.zeros(19, 4)}, r"main_grad is \[19, 4\]; it must be \[20, 4\]"),
        (
            {"signal": DenseSignal(torch.zeros(3, 6), torch.zeros(17, 6))},
            "signal.head has 17 rows; it must have one for each of the vocab_size 18 ids",
        ),
        ({"signal": torch.zeros(3, 20)}, "signal is a Tensor; it must be a DenseSignal of hidden states and head"),
        ({"labels": torch.zeros(3)}, r"labels is torch\.float32; it must be int64"),
        (
            {"student_hidden": torch.zeros(3, 4, dtype=torch.int64), "student_head": torch.zeros(20, 4).long()},
            r"student_hidden is torch\.int64; it must be floating point",
        ),
        ({"temperature": None}, "temperature is None; it must be > 0"),
        ({"chunk_mib": "64"}, "chunk_mib is 64; it must be a whole number"),
        ({"kd_weight": float("nan")}, "kd_weight is nan; it must be a number of at least 0"),
        ({"ce_weight": -1.0}, r"ce_weight is -1\.0; it must be a number of at least 0"),
        ({"sequence_parallel": True}, "sequence_parallel is set without tp_group"),
        ({"weight": float("nan")}, "token_weights is nan in row 1; it must be finite and at least 0"),
        ({"weight": float("inf")}, "token_weights is inf in row 1; it must be finite and at least 0"),
        ({"weight": -0.5}, r"token_weights is -0\.5 in row 1"),
        ({"main_grad": torch.zeros(20, 4, dtype=torch.int64)}, r"main_grad is torch\.int64; it must be float32"),
        ({"signal": DenseSignal(torch.zeros(2, 6), torch.zeros(20, 6))}, r"signal.hidden is \[2, 6\]"),
    ],
)
def test_bad_arguments_are_told(changes, words):
    with pytest.raises(ValueError, match=words):
        call(**changes)


def test_no_tokens_at_all():
    empty = dataclasses.asdict(
        distillation_loss(
            torch.zeros(0, 4),
            torch.zeros(20, 4),
            torch.zeros(0, dtype=torch.int64),
            torch.zeros(0),
            None,
            **{**GOOD, "kd_weight": 0.0},
        )
    )
    assert set(empty) == {"total", "kd", "ce", "num_tokens", "weight_sum"}
    assert {value.item() for value in empty.values()} == {0}


@pytest.mark.parametrize("rows", [18, 19, 152])
def test_a_teacher_padded_otherwise_just_works(rows):
    torch.manual_seed(0)
    hidden, head, teacher, teacher_head = torch.randn(3, 4), torch.randn(20, 4), torch.randn(3, 6), torch.randn(18, 6)
    padded = torch.cat([teacher_head, torch.full((rows - 18, 6), 7.0)])
    alike = torch.cat([teacher_head, torch.zeros(2, 6)])
    answers = []
    for signal_head in (padded, alike):
        x, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        sums = call(student_hidden=x, student_head=w, signal=DenseSignal(teacher, signal_head))
        sums.total.backward()
        answers.append((sums.total.detach(), x.grad, w.grad))
    for found, expected in zip(*answers, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_teacher_of_152064_rows_and_a_student_of_151936():
    torch.manual_seed(0)
    vocab_size = 151643  # what both models' tokenizer has
    signal = DenseSignal(torch.randn(3, 2), torch.randn(152064, 2))
    x, w = torch.randn(3, 2, requires_grad=True), torch.randn(151936, 2, requires_grad=True)
    sums = call(student_hidden=x, student_head=w, signal=signal, vocab_size=vocab_size)
    sums.total.backward()
    log_p, log_q = (
        (a.double() @ b[:vocab_size].double().T).log_softmax(1) for a, b in ((signal.hidden, signal.head), (x, w))
    )
    expected = (log_p.exp() * (log_p - log_q)).sum() - log_q[range(3), [0, 1, 2]].sum()
    torch.testing.assert_close(sums.total.double(), expected, rtol=2e-6, atol=0)
    assert w.grad is not None
    (exact,) = torch.autograd.grad(expected, w)
    assert (w.grad.double() - exact).norm() < 2e-6 * exact.norm()
    assert w.grad[vocab_size:].abs().max() == 0
