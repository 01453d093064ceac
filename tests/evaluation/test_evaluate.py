"""Held-out scores against transformers in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from megakd.common.errors import UserError
from tests.training.runs import SEQUENCE, build, layout, learnable_tokens, run_values, write_run_files, write_tokens

HELD_OUT = 13  # samples: no layout below divides it
LAYOUTS = {
    "one_rank": (1, layout()),
    "tp2_sequence_parallel": (2, layout(2, parallel__sequence_parallel=True)),
    "tp2_pp2": (4, layout(2, 2)),
    "dp2": (2, layout()),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run_files(tmp_path_factory.mktemp("evaluation"))
    write_tokens(folder / "held_out", learnable_tokens(HELD_OUT * SEQUENCE + 1)[::-1].copy())
    return folder


def weights_of(labels: torch.Tensor) -> torch.Tensor:
    """Some weight for each label, of one in seven none."""
    return (labels % 7) / 3


def expected_scores(folder: Path, counted: int, *, weighted: bool = False) -> dict[str, float]:
    student = LlamaForCausalLM.from_pretrained(folder / "student", dtype=torch.float64).eval()
    teacher = LlamaForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float64).eval()
    text = torch.from_numpy(np.array(learnable_tokens(HELD_OUT * SEQUENCE + 1)[::-1]))
    windows = torch.stack([text[i * SEQUENCE : i * SEQUENCE + SEQUENCE + 1] for i in range(HELD_OUT)])
    with torch.no_grad():
        log_q = student(windows[:, :-1]).logits.log_softmax(-1).flatten(0, 1)[:counted]
        log_p = teacher(windows[:, :-1]).logits.log_softmax(-1).flatten(0, 1)[:counted]
    labels = windows[:, 1:].reshape(-1, 1)[:counted]
    weights = weights_of(labels[:, 0]).double() if weighted else torch.ones(len(labels), dtype=torch.float64)

    def mean(figures: torch.Tensor) -> float:
        return float((weights * figures).sum() / weights.sum())

    ce = -mean(log_q.gather(1, labels)[:, 0])
    return {
        "num_tokens": int((weights > 0).sum()),
        "cross_entropy": ce,
        "perplexity": math.exp(ce),
        "kl_to_teacher": mean((log_p.exp() * (log_p - log_q)).sum(1)),
        "agreement": mean((log_p.argmax(1) == log_q.argmax(1)).double()),
        "teacher_cross_entropy": -mean(log_p.gather(1, labels)[:, 0]),
    }


def scores(values: dict[str, Any], factor: float | None = None) -> dict[str, Any]:
    """With a factor tokens have `weights_of` their labels, times that."""
    from megakd.evaluation import evaluate
    from megakd.training.held_out import held_out_batches
    from megakd.training.train_data import open_held_out_data

    run = build(values)
    batches = list(held_out_batches(run.config, open_held_out_data(run.config, "valid"), run.mesh, run.platform.device))
    for batch in batches if factor is not None else []:
        batch["loss_mask"] *= factor * weights_of(batch["labels"])
    return evaluate(
        run.student.model,
        run.mesh,
        batches,
        run.teacher,
        vocab_size=run.objective.vocab_size,
        chunk_mib=None,
        sequence_parallel=run.student.sequence_parallel,
        window=3,
    ).to_dict()


@pytest.mark.parametrize("max_tokens", [None, 3 * SEQUENCE + 5])
@pytest.mark.parametrize("name", LAYOUTS)
def test_scores_equal_transformers(
    folder: Path, name: str, max_tokens: int | None, run_ranks: Callable[..., list[Any]]
) -> None:
    world_size, settings = LAYOUTS[name]
    values = run_values(folder, **settings, data__valid=str(folder / "held_out"), evaluation__max_tokens=max_tokens)
    expected = expected_scores(folder, max_tokens or HELD_OUT * SEQUENCE)
    for found in run_ranks(world_size, scores, values):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_weighted_scores_equal_transformers(folder: Path, name: str, run_ranks: Callable[..., list[Any]]) -> None:
    world_size, settings = LAYOUTS[name]
    values = run_values(folder, **settings, data__valid=str(folder / "held_out"))
    expected = expected_scores(folder, HELD_OUT * SEQUENCE, weighted=True)
    assert expected["num_tokens"] < HELD_OUT * SEQUENCE
    found = run_ranks(world_size, scores, values, 1.0)
    assert all(rank == pytest.approx(expected, rel=1e-5) for rank in found)
    assert run_ranks(world_size, scores, values, 0.5) == found


def test_held_out_data_of_which_nothing_counts_is_refused(folder: Path, run_ranks: Callable[..., list[Any]]) -> None:
    values = run_values(folder, data__valid=str(folder / "held_out"))
    with pytest.raises(UserError, match="none of the held-out tokens counts"):
        run_ranks(1, scores, values, 0.0)
