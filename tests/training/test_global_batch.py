"""The gradient of a global batch does not depend on how it is cut, however its tokens' weights are spread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.training.layout_run import gather_gradients
from tests.training.runs import SEQUENCE, VOCAB, Built, build, layout, run_values, write_run_files

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


SPREAD = ("ones", "mixed")


def global_batch(weights: str = "ones") -> dict[str, torch.Tensor]:
    """Samples with few, many and no counted tokens; the second pair is a microbatch without any.

    "mixed" weights are of several sizes, in each sample and from one to the next.
    """
    generator = np.random.default_rng(11)
    text = torch.from_numpy(generator.integers(VOCAB, size=(BATCH, SEQUENCE + 1)))
    share = np.array([0.1, 0.9, 0.0, 0.0, 0.5, 1.0, 0.0, 0.3])[:, None]
    mask = torch.from_numpy(generator.random((BATCH, SEQUENCE)) < share)
    assert [bool(row.any()) for row in mask] == [True, True, False, False, True, True, False, True]
    sizes = torch.from_numpy(generator.uniform(0.1, 1.0, mask.shape)) * torch.arange(1, BATCH + 1)[:, None] ** 2
    mask = mask * (sizes if weights == "mixed" else 1)
    return {
        "tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": mask.float(),
        "position_ids": torch.arange(SEQUENCE).expand(BATCH, SEQUENCE), "sample_ids": torch.arange(BATCH),
    }  # fmt: skip


def cut(run: Built, batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """This rank's microbatches."""
    size = run.config.data.micro_batch_size
    parts = [{name: part[i : i + size] for name, part in batch.items()} for i in range(0, BATCH, size)]
    return parts[run.mesh.dp_rank :: run.mesh.dp_size]


def sums_and_gradients(values: dict[str, Any]) -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
    run = build(values)
    found = {}
    for weights in SPREAD:
        sums = run.accumulate(cut(run, global_batch(weights)))
        found[weights] = sums, gather_gradients(run.student)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def whole(folder: Path, run_ranks: Callable[..., list[Any]]) -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
    return run_ranks(1, sums_and_gradients, run_values(folder, **CUTS["one_microbatch"][1]))[0]


@pytest.mark.parametrize("weights", SPREAD)
def test_whole_batch_equals_transformers(
    folder: Path, whole: dict[str, tuple[list[float], dict[str, torch.Tensor]]], weights: str
) -> None:
    student = LlamaForCausalLM.from_pretrained(folder / "student", dtype=torch.float64)
    teacher = LlamaForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float64).eval()
    batch = global_batch(weights)
    log_q = student(batch["tokens"]).logits.log_softmax(-1)
    with torch.no_grad():
        log_p = teacher(batch["tokens"]).logits.log_softmax(-1)
    mask = batch["loss_mask"].double()
    kd = ((log_p.exp() * (log_p - log_q)).sum(-1) * mask).sum()
    ce = -(log_q.gather(-1, batch["labels"][..., None]).squeeze(-1) * mask).sum()
    ((0.5 * kd + ce) / mask.sum()).backward()
    counted = mask.count_nonzero()
    assert weights == "mixed" or counted == mask.sum()
    expected = [x.item() for x in (0.5 * kd + ce, kd, ce, counted, mask.sum())]
    sums, gradient = whole[weights]
    assert sums == pytest.approx(expected, rel=1e-6)
    for name, parameter in student.named_parameters():
        assert (gradient[name] - parameter.grad).norm() < 1e-5 * parameter.grad.norm(), name


@pytest.mark.parametrize("name", [name for name in CUTS if name != "one_microbatch"])
def test_a_cut_does_not_change_the_gradient(
    folder: Path,
    whole: dict[str, tuple[list[float], dict[str, torch.Tensor]]],
    name: str,
    run_ranks: Callable[..., list[Any]],
) -> None:
    world_size, settings = CUTS[name]
    for found in run_ranks(world_size, sums_and_gradients, run_values(folder, **settings)):
        for weights in SPREAD:
            sums, gradient = found[weights]
            assert sums == pytest.approx(whole[weights][0], rel=1e-6)
            for key, expected in whole[weights][1].items():
                # A few heavy tokens round as a small batch does.
                tolerance = 1e-6 if weights == "ones" else 2e-6
                assert (gradient[key] - expected).norm() < tolerance * expected.norm(), (weights, key)


def steps_of_equal_weights(values: dict[str, Any], weights: list[float]) -> list[tuple[Any, dict[str, torch.Tensor]]]:
    """What a first step reports and leaves in the gradient buffers, where every token has the same weight."""
    from megakd.training.step import train_step

    run, found = build(values), []
    for weight in weights:
        batch = global_batch()
        batch["loss_mask"] *= weight
        # Without a learning rate every step is the first.
        result = train_step(
            run.student, run.teacher, run.objective, run.optimizer, cut(run, batch), 0.0, run.platform,
            signal_window=run.signal_window,
        )  # fmt: skip
        found.append((result, gather_gradients(run.student)))
    return found


@pytest.mark.parametrize("name", ["tp2_pp2", "dp2", "windows"])
def test_one_weight_everywhere_changes_nothing(folder: Path, name: str, run_ranks: Callable[..., list[Any]]) -> None:
    world_size, settings = {
        "tp2_pp2": (4, layout(2, 2, data__micro_batch_size=1)),
        "dp2": (2, layout(data__micro_batch_size=2)),
        "windows": (1, layout(data__micro_batch_size=1, teacher__signal_window=2)),
    }[name]
    weights = [1.0, 0.5, 0.3, 1e-30, 1e6]
    for found in run_ranks(world_size, steps_of_equal_weights, run_values(folder, **settings), weights):
        (expected, gradients), (half, half_gradients), *others = found
        # Halving changes no digit.
        assert half == expected and not expected.skipped and expected.loss > 0
        assert all(torch.equal(half_gradients[key], gradient) for key, gradient in gradients.items())
        for result, other in others:
            assert result.tokens == expected.tokens
            for field in ("loss", "kd_loss", "ce_loss", "grad_norm"):
                assert getattr(result, field) == pytest.approx(getattr(expected, field), rel=1e-5)
            for key, gradient in gradients.items():
                assert (other[key] - gradient).norm() < 1e-5 * gradient.norm(), key


def without_tokens(values: dict[str, Any]) -> tuple[list[float], float]:
    run, batch = build(values), global_batch()
    batch["loss_mask"].zero_()
    sums = run.accumulate([batch])
    return sums, max(gradient.abs().max().item() for gradient in gather_gradients(run.student).values())


def test_a_batch_without_a_counted_token_is_zero_not_nan(folder: Path, run_ranks: Callable[..., list[Any]]) -> None:
    values = run_values(folder, **CUTS["one_microbatch"][1])
    assert run_ranks(1, without_tokens, values)[0] == ([0.0] * 5, 0.0)
