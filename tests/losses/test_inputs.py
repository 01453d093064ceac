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
    assert call().num_tokens == 3


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
            {"signal": DenseSignal(torch.zeros(3, 6), torch.zeros(24, 6))},
            r"signal.head is \[24, 6\]; it must be \[20, 6\]",
        ),
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
    assert {name: value.item() for name, value in empty.items()} == {"total": 0, "kd": 0, "ce": 0, "num_tokens": 0}
