"""Held-out microbatches for evaluation."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megakd.config.layouts import window_microbatches
from megakd.config.schema import Config, EvaluationSection
from megakd.data.batches import EvaluationBatches
from megakd.parallel.mesh import ModelMesh
from megakd.training.train_data import HeldOutData

# More would fill no pipeline better.
_MOST_MICROBATCHES = 8


def evaluates_after(step: int, steps: int, evaluation: EvaluationSection) -> bool:
    """Whether a run of so many steps is measured after its step `step`, counted from 1."""
    is_due = evaluation.interval is not None and step % evaluation.interval == 0
    return is_due or (evaluation.at_end and step == steps)


def evaluation_window(config: Config, students: int) -> int:
    """The student's microbatches that it and its teacher are measured on at a time: no more than are held in training.

    Args:
        students: the student's ranks.
    """
    return min(_MOST_MICROBATCHES, window_microbatches(config, students))


def held_out_batches(
    config: Config, data: HeldOutData, mesh: ModelMesh, device: torch.device
) -> Iterable[dict[str, Tensor]]:
    """This data rank's part of the held-out samples."""
    return EvaluationBatches(
        data.samples,
        data.ids,
        micro_batch_size=config.data.micro_batch_size,
        data_parallel_rank=mesh.dp_rank,
        data_parallel_size=mesh.dp_size,
        max_tokens=config.evaluation.max_tokens,
        device=device,
    )
