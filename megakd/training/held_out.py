"""Held-out microbatches for evaluation."""

from __future__ import annotations

import torch

from megakd.config.layouts import window_microbatches, windows_per_step
from megakd.config.schema import Config, EvaluationSection
from megakd.data.batches import EvaluationBatches
from megakd.parallel.mesh import ModelMesh
from megakd.training.train_data import HeldOutData, TrainData

# More would fill no pipeline better.
_MOST_MICROBATCHES = 8
_WINDOWS_PER_CHECK = 100


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


def checks_teacher_first(config: Config, first_step: int, steps: int) -> bool:
    """Whether a run from `first_step` to `steps` measures its teacher by itself before it trains."""
    evaluates = config.evaluation.at_start and first_step == 0
    return config.distill.kd_weight > 0 and first_step < steps and not evaluates


def checks_teacher_after(step: int, steps: int, config: Config, students: int) -> bool:
    """Whether a run of so many steps measures its teacher by itself after its step `step`, counted from 1.

    At the end, and where a checkpoint is due after at least so many windows that the measuring is a hundredth of them;
    not where an evaluation measures it.

    Args:
        students: the student's ranks.
    """
    if config.distill.kd_weight == 0 or evaluates_after(step, steps, config.evaluation):
        return False
    save_interval = config.checkpoint.save_interval
    if not save_interval:
        return step == steps
    windows = save_interval * windows_per_step(config, students)
    return step == steps or step % (save_interval * -(-_WINDOWS_PER_CHECK // windows)) == 0


def check_samples(config: Config, data: TrainData, held_out: HeldOutData | None) -> HeldOutData:
    """Samples whose first microbatch a teacher is measured on: those held out, else those of the first step."""
    if held_out is not None:
        return held_out
    return HeldOutData(data.samples, data.order.sample_ids(0, config.data.global_batch_size), [])


def held_out_batches(config: Config, data: HeldOutData, mesh: ModelMesh, device: torch.device) -> EvaluationBatches:
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
