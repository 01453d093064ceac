"""A teacher beside the student is only ever read: not optimized, not changed, not in the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.training.runs import build, layout, run_values, save_llama, write_run_files

# Sizes that the student (width 32, MLP 48) has nowhere.
TEACHER_HIDDEN, TEACHER_FFN = 40, 56


def what_is_trained_and_saved(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a run with a teacher optimizes and writes, and whether training touched the teacher."""
    from megatron.core.dist_checkpointing import load_tensors_metadata

    run = build(values)
    tensors = [*run.teacher.model.parameters(), *([] if run.teacher.head is None else [run.teacher.head])]
    before = [tensor.clone() for tensor in tensors]
    run.train(0, 2)
    path = run.save(folder, 2)
    memory = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    optimized = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    return {
        "tensors": len(tensors),
        "with_gradient": sum(tensor.requires_grad or tensor.grad is not None for tensor in tensors),
        "in_training_mode": run.teacher.model.training,
        "changed": sum(not torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True)),
        "optimized": len(optimized),
        "optimized_of_teacher": sum(parameter.untyped_storage().data_ptr() in memory for parameter in optimized),
        "saved_shapes": {key: entry.global_shape for key, entry in load_tensors_metadata(str(path)).items()},
    }


def test_a_teacher_is_neither_trained_nor_saved(tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    folder = write_run_files(tmp_path)
    save_llama(
        folder / "teacher", seed=2, hidden_size=TEACHER_HIDDEN, intermediate_size=TEACHER_FFN, num_hidden_layers=2
    )
    values = run_values(folder, **layout(1, 2))
    for found in run_ranks(2, what_is_trained_and_saved, values, tmp_path / "checkpoints"):
        assert found["tensors"] > 5 and found["optimized"] > 10
        for nothing in ("with_gradient", "in_training_mode", "changed", "optimized_of_teacher"):
            assert not found[nothing], nothing
        shapes = found["saved_shapes"].values()
        assert any(32 in shape for shape in shapes)  # the student's width
        assert not any(size in shape for shape in shapes for size in (TEACHER_HIDDEN, TEACHER_FFN, 2 * TEACHER_FFN))
