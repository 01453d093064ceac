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


def expected_scores(folder: Path, counted: int) -> dict[str, float]:
    student = LlamaForCausalLM.from_pretrained(folder / "student", dtype=torch.float64).eval()
    teacher = LlamaForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float64).eval()
    text = torch.from_numpy(np.array(learnable_tokens(HELD_OUT * SEQUENCE + 1)[::-1]))
    windows = torch.stack([text[i * SEQUENCE : i * SEQUENCE + SEQUENCE + 1] for i in range(HELD_OUT)])
    with torch.no_grad():
        log_q = student(windows[:, :-1]).logits.log_softmax(-1).flatten(0, 1)[:counted]
        log_p = teacher(windows[:, :-1]).logits.log_softmax(-1).flatten(0, 1)[:counted]
    labels = windows[:, 1:].reshape(-1, 1)[:counted]
    ce = -log_q.gather(1, labels).mean().item()
    return {
        "num_tokens": counted,
        "cross_entropy": ce,
        "perplexity": math.exp(ce),
        "kl_to_teacher": (log_p.exp() * (log_p - log_q)).sum(1).mean().item(),
        "agreement": (log_p.argmax(1) == log_q.argmax(1)).double().mean().item(),
        "teacher_cross_entropy": -log_p.gather(1, labels).mean().item(),
    }


def scores(values: dict[str, Any]) -> dict[str, Any]:
    from megakd.evaluation import evaluate
    from megakd.training.held_out import held_out_batches
    from megakd.training.train_data import open_held_out_data

    run = build(values)
    return evaluate(
        run.student.model,
        run.mesh,
        held_out_batches(run.config, open_held_out_data(run.config, "valid"), run.mesh, run.platform.device),
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
