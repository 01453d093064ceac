"""A teacher in any layout gives the loss and every gradient that one rank gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import layout, learnable_tokens, run_values, save_llama, write_tokens

SEQUENCE, VOCAB = 16, 300
EIGHT = {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}


def teacher(tp: int | None = None, pp: int | None = None, **settings: Any) -> dict[str, Any]:
    """Settings of the teacher's own layout."""
    return {"teacher__parallel": {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, **settings}}


CUT = {"parallel__sequence_parallel": True}
# world size, the student's settings, the teacher's
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp2_pp2_from_tp1_pp4": (4, layout(2, 2), teacher(1, 4)),
    "tp2_pp2_from_tp4_pp1": (4, layout(2, 2), teacher(4, 1)),
    "tp2_pp2_from_dp4": (4, layout(2, 2), teacher(1, 1)),
    "tp2_pp2_from_tp2_dp2": (4, layout(2, 2), teacher(2, 1)),
    "both_cut": (4, layout(2, 2, **CUT), teacher(4, 1, sequence_parallel=True)),
    "student_cut": (4, layout(2, 2, **CUT), teacher(4, 1, sequence_parallel=False)),
    "teacher_cut": (4, layout(2, 2), teacher(4, 1, sequence_parallel=True)),
    "micro_batch_1": (4, layout(2, 2), teacher(1, 4, micro_batch_size=1)),
    "micro_batch_4": (4, layout(1, 2), teacher(2, 2, micro_batch_size=4)),
    "dp4_from_pp4": (4, layout(1, 1), teacher(1, 4)),
    "window_1": (4, layout(2, 2), teacher(1, 4) | {"teacher__signal_window": 1}),
    "window_2": (2, layout(2, 1), {"teacher__signal_window": 2}),
    "window_4_overlapped": (
        4, layout(1, 2, optimizer__overlap_grad_reduce=True, optimizer__use_distributed_optimizer=True),
        teacher(2, 2) | {"teacher__signal_window": 4},
    ),
    "offloaded": (4, layout(2, 2), teacher(4, 1) | {"teacher__offload": "cpu"}),
    "micro_batch_alone": (1, layout(), teacher(micro_batch_size=4)),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    for name, tied in (("student", False), ("tied", True)):
        save_llama(folder / name, seed=1, tie_word_embeddings=tied, hidden_size=32, **EIGHT)
    save_llama(folder / "teacher", seed=2, std=0.2, hidden_size=48, intermediate_size=64, **EIGHT)
    save_llama(folder / "tied_teacher", seed=3, std=0.2, hidden_size=48, tie_word_embeddings=True, **EIGHT)
    write_tokens(folder / "data", learnable_tokens(64 * SEQUENCE + 1))
    return folder


def values_of(files: Path, student: str = "student", teacher: str = "teacher", **settings: Any) -> dict[str, Any]:
    values = run_values(files, student__init={"path": str(files / student)}, data__global_batch_size=16, **settings)
    values["teacher"]["path"] = str(files / teacher)
    return values


def first_step(values: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Sums of the first global batch and its gradients as full tensors, by Hugging Face name."""
    from tests.training.layout_run import gather_gradients
    from tests.training.runs import build

    built = build(values)
    batches = built.batches()
    try:
        sums = built.accumulate(batches.microbatches(0))
    finally:
        batches.close()
    return sums, gather_gradients(built.student)


def assert_same(found: Any, expected: Any) -> None:
    (sums, gradients), (right_sums, right_gradients) = found, expected
    assert sums == pytest.approx(right_sums, rel=1e-5)
    assert gradients.keys() == right_gradients.keys()
    for name, gradient in gradients.items():
        right = right_gradients[name]
        assert torch.linalg.vector_norm(gradient - right) <= 1e-5 * torch.linalg.vector_norm(right), name


@pytest.fixture(scope="module")
def on_one_rank(run_ranks: Callable[..., Any], files: Path) -> Callable[..., Any]:
    """What one rank gives, in the student's own layout; computed once for each pair of models."""
    known: dict[Any, Any] = {}

    def compute(student: str, teacher: str) -> Any:
        if (student, teacher) not in known:
            known[student, teacher] = run_ranks(1, first_step, values_of(files, student, teacher))[0]
        return known[student, teacher]

    return compute


@pytest.mark.parametrize(
    ("case", "models"),
    [
        *((case, ("student", "teacher")) for case in CASES),
        ("tp2_pp2_from_tp4_pp1", ("tied", "teacher")),
        ("tp2_pp2_from_tp1_pp4", ("student", "tied_teacher")),
        ("both_cut", ("tied", "tied_teacher")),
    ],
)
def test_loss_and_gradients_are_those_of_one_rank(run_ranks, files, on_one_rank, case, models):
    ranks, student, of_teacher = CASES[case]
    values = values_of(files, *models)
    for key, value in (student | of_teacher).items():
        section, name = key.split("__")
        values[section][name] = value
    for found in run_ranks(ranks, first_step, values)[:1]:
        assert_same(found, on_one_rank(*models))
