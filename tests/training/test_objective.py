"""Every key of the distill section reaches the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megakd.config.schema import DistillSection
from megakd.training.objective import Objective, describe_loss
from tests.losses.ranks import sharded_signal
from tests.losses.reference import make_case, relative, solve


def objective_on_rank(case: Any, distill: DistillSection) -> torch.Tensor:
    group = torch.distributed.group.WORLD
    assert group is not None
    objective = Objective(distill, case.vocab_size, group, sequence_parallel=False, accumulate_main_grad=False)
    batch = {"labels": case.labels[None], "loss_mask": case.token_weights[None]}
    total, _, record = objective((case.hidden[:, None], case.head), batch, sharded_signal(case, False))
    assert torch.equal(total.double(), record[0])
    return record


@pytest.mark.parametrize(
    "keys",
    [
        {"loss": "reverse_kl"},
        {"loss": "tvd", "teacher_temperature": 1.5},
        {"loss": "jsd"},
        {"loss": "jsd", "jsd_beta": 0.2, "temperature": 2.0, "temperature_squared": False},
        {"loss": "skew_forward_kl"},
        {"loss": "skew_reverse_kl", "skew_alpha": 0.4},
    ],
)
def test_the_loss_is_the_one_that_is_named(run_ranks, keys):
    settings = {k: v for k, v in keys.items() if k != "loss"}
    case = make_case(51, rows=40, padded=128, vocab_size=120, divergence=keys["loss"], **settings)
    distill = DistillSection(kd_weight=case.kd_weight, ce_weight=case.ce_weight, **keys)
    (record,) = run_ranks(1, objective_on_rank, case, distill)
    expected = solve(case)
    for actual, wanted in zip(record, (expected.total, expected.kd, expected.ce), strict=False):
        assert relative(actual, wanted) <= 1e-10


def test_the_chunk_is_told_in_one_line():
    assert "93.8 MiB" in describe_loss(DistillSection(), 4096, 16000, "cpu")
    plain = describe_loss(DistillSection(ce_weight=0.5), 4096, 16000, "cpu")
    assert plain.startswith(
        "loss forward_kl and cross-entropy: chunks of 768 of 4,096 tokens x 16,000 columns, 93.8 MiB"
    )
    alone = describe_loss(DistillSection(kd_weight=0.0, ce_weight=1.0, loss_chunk_mib=16), 4096, 16000, "cpu")
    assert alone.startswith("loss cross-entropy: chunks of 256 of 4,096 tokens x 16,000 columns, 15.6 MiB")
