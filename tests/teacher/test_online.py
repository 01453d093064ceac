"""The online teacher: other sizes and another vocabulary than the student's, and nothing of it is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.training.layout_run import gather_gradients
from tests.training.runs import SEQUENCE, build, layout, learnable_tokens, run_values, save_llama, write_tokens

SAMPLES = 8
VOCABULARIES = {"teacher_larger": (260, 300), "teacher_smaller": (300, 250), "teacher_padded_further": (250, 520)}


def first_gradient(values: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    run = build(values)
    batches = run.batches()
    total, _, _, tokens, _ = run.accumulate(batches.microbatches(0))
    batches.close()
    return total / tokens, gather_gradients(run.student)


def reference(folder: Path, shared: int, kd_weight: float, ce_weight: float) -> tuple[float, dict[str, torch.Tensor]]:
    student = LlamaForCausalLM.from_pretrained(folder / "student", dtype=torch.float64)
    teacher = LlamaForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float64).eval()
    text = torch.from_numpy(learnable_tokens(SAMPLES * SEQUENCE + 1, shared))
    windows = torch.stack([text[i * SEQUENCE : i * SEQUENCE + SEQUENCE + 1] for i in range(SAMPLES)])
    log_q = student(windows[:, :-1]).logits[..., :shared].log_softmax(-1)
    with torch.no_grad():
        log_p = teacher(windows[:, :-1]).logits[..., :shared].log_softmax(-1)
    kd = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    ce = -log_q.gather(-1, windows[:, 1:, None]).mean()
    loss = kd_weight * kd + ce_weight * ce
    loss.backward()
    return loss.item(), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("vocabularies", VOCABULARIES)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2)])
def test_models_of_different_vocabularies_share_the_smaller_one(
    vocabularies: str, tp: int, pp: int, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    student_vocab, teacher_vocab = VOCABULARIES[vocabularies]
    shared = min(student_vocab, teacher_vocab)
    save_llama(tmp_path / "student", seed=1, vocab=student_vocab)
    save_llama(
        tmp_path / "teacher", seed=2, std=0.2, vocab=teacher_vocab, hidden_size=48, num_hidden_layers=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    write_tokens(tmp_path / "data", learnable_tokens(SAMPLES * SEQUENCE + 1, shared), shared)
    values = run_values(tmp_path, **layout(tp, pp), distill__kd_weight=0.5, distill__ce_weight=1.0)
    expected_loss, expected = reference(tmp_path, shared, 0.5, 1.0)
    loss, gradient = run_ranks(tp * pp, first_gradient, values)[0]
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, value in expected.items():
        difference = (gradient[name].double() - value).norm() / value.norm()
        assert difference < 1e-5, f"{name}: {difference:.2e}"


def teacher_state(values: dict[str, Any]) -> tuple[int, bool]:
    run = build(values)
    batches = run.batches()
    run.train(0, 1)
    batches.close()
    teacher = list(run.teacher.model.parameters())
    optimized = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    gradients = any(p.requires_grad or p.grad is not None for p in teacher) or run.teacher.head.grad is not None
    return len([p for p in teacher if id(p) in optimized]), gradients


def test_nothing_of_the_teacher_is_trained(tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    save_llama(tmp_path / "student", seed=1)
    save_llama(tmp_path / "teacher", seed=2)
    write_tokens(tmp_path / "data", learnable_tokens(SAMPLES * SEQUENCE + 1))
    assert run_ranks(1, teacher_state, run_values(tmp_path)) == [(0, False)]
