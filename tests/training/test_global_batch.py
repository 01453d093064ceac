"""The gradient of a global batch does not depend on how it is cut, however its counted tokens are spread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.training.layout_run import gather_gradients
from tests.training.runs import SEQUENCE, VOCAB, build, layout, run_values, write_run_files

BATCH = 8
CUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one_microbatch": (1, layout(data__micro_batch_size=8)),
    "pairs": (1, layout(data__micro_batch_size=2)),
    "single_samples": (1, layout(data__micro_batch_size=1)),
    "dp2": (2, layout(data__micro_batch_size=2)),
    "dp2_single_samples_distributed_optimizer": (
        2, layout(data__micro_batch_size=1, optimizer__use_distributed_optimizer=True),
    ),
    "pp2": (2, layout(1, 2, data__micro_batch_size=1)),
    "tp2_sequence_parallel": (2, layout(2, parallel__sequence_parallel=True, data__micro_batch_size=4)),
}  # fmt: skip


def global_batch() -> dict[str, torch.Tensor]:
    """Samples with few, many and no counted tokens; the second pair is a microbatch without any."""
    generator = np.random.default_rng(11)
    text = torch.from_numpy(generator.integers(VOCAB, size=(BATCH, SEQUENCE + 1)))
    share = np.array([0.1, 0.9, 0.0, 0.0, 0.5, 1.0, 0.0, 0.3])[:, None]
    mask = torch.from_numpy(generator.random((BATCH, SEQUENCE)) < share)
    assert [bool(row.any()) for row in mask] == [True, True, False, False, True, True, False, True]
    return {
        "tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": mask.float(),
        "position_ids": torch.arange(SEQUENCE).expand(BATCH, SEQUENCE), "sample_ids": torch.arange(BATCH),
    }  # fmt: skip


def sums_and_gradient(values: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    run, batch = build(values), global_batch()
    size = run.config.data.micro_batch_size
    parts = [{name: part[i : i + size] for name, part in batch.items()} for i in range(0, BATCH, size)]
    sums = run.accumulate(parts[run.mesh.dp_rank :: run.mesh.dp_size])
    return sums, gather_gradients(run.student)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def whole(folder: Path, run_ranks: Callable[..., list[Any]]) -> tuple[list[float], dict[str, torch.Tensor]]:
    return run_ranks(1, sums_and_gradient, run_values(folder, **CUTS["one_microbatch"][1]))[0]


def test_whole_batch_equals_transformers(folder: Path, whole: tuple[list[float], dict[str, torch.Tensor]]) -> None:
    student = LlamaForCausalLM.from_pretrained(folder / "student", dtype=torch.float64)
    teacher = LlamaForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float64).eval()
    batch = global_batch()
    log_q = student(batch["tokens"]).logits.log_softmax(-1)
    with torch.no_grad():
        log_p = teacher(batch["tokens"]).logits.log_softmax(-1)
    mask = batch["loss_mask"].double()
    kd = ((log_p.exp() * (log_p - log_q)).sum(-1) * mask).sum()
    ce = -(log_q.gather(-1, batch["labels"][..., None]).squeeze(-1) * mask).sum()
    ((0.5 * kd + ce) / mask.sum()).backward()
    assert whole[0] == pytest.approx([(0.5 * kd + ce).item(), kd.item(), ce.item(), mask.sum().item()], rel=1e-6)
    for name, parameter in student.named_parameters():
        assert (whole[1][name] - parameter.grad).norm() < 1e-5 * parameter.grad.norm(), name


@pytest.mark.parametrize("name", [name for name in CUTS if name != "one_microbatch"])
def test_a_cut_does_not_change_the_gradient(
    folder: Path, whole: tuple[list[float], dict[str, torch.Tensor]], name: str, run_ranks: Callable[..., list[Any]]
) -> None:
    world_size, settings = CUTS[name]
    for sums, gradient in run_ranks(world_size, sums_and_gradient, run_values(folder, **settings)):
        assert sums == pytest.approx(whole[0], rel=1e-6)
        for key, expected in whole[1].items():
            assert (gradient[key] - expected).norm() < 1e-6 * expected.norm(), key


def without_tokens(values: dict[str, Any]) -> tuple[list[float], float]:
    run, batch = build(values), global_batch()
    batch["loss_mask"].zero_()
    sums = run.accumulate([batch])
    return sums, max(gradient.abs().max().item() for gradient in gather_gradients(run.student).values())


def test_a_batch_without_a_counted_token_is_zero_not_nan(folder: Path, run_ranks: Callable[..., list[Any]]) -> None:
    values = run_values(folder, **CUTS["one_microbatch"][1])
    assert run_ranks(1, without_tokens, values)[0] == ([0.0, 0.0, 0.0, 0.0], 0.0)
