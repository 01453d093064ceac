"""The loss of one microbatch, from the student's output and the teacher's signal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.common.step_parts import BACKWARD, LOSS
from megakd.config.schema import DistillSection
from megakd.losses import DenseSignal, SparseSignal, chunk_rows, distillation_loss
from megakd.models.microbatch import run_stage
from megakd.platform import StepClock

Batch = dict[str, Tensor]
Signal = DenseSignal | SparseSignal | None


def describe_loss(distill: DistillSection, num_rows: int, local_vocab: int, device_type: str) -> str:
    """One line on the loss and the chunk of a microbatch's `num_rows` tokens that it works on at a time."""
    models = 1 if distill.kd_weight == 0 else 2
    rows = chunk_rows(num_rows, local_vocab, device_type=device_type, chunk_mib=distill.loss_chunk_mib, models=models)
    parts = {distill.loss: distill.kd_weight, "cross-entropy": distill.ce_weight}
    name = " and ".join(part for part, weight in parts.items() if weight > 0)
    mebibytes = models * rows * local_vocab * 4 / 2**20
    return (
        f"loss {name}: chunks of {rows:,} of {num_rows:,} tokens x {local_vocab:,} columns, {mebibytes:,.1f} MiB of "
        "logits (distill.loss_chunk_mib)"
    )


@dataclass(frozen=True)
class Objective:
    """kd_weight * T^2 * divergence + ce_weight * cross-entropy, summed over the tokens with their weights.

    Attributes:
        vocab_size: the vocabulary student and teacher share; columns beyond it count for neither.
        accumulate_main_grad: the head's gradient goes straight into megatron-core's fp32 buffer.
        clock: told when the loss begins and ends.
    """

    distill: DistillSection
    vocab_size: int
    tp_group: dist.ProcessGroup
    sequence_parallel: bool
    accumulate_main_grad: bool = True
    clock: StepClock = field(default_factory=StepClock)

    def forward_step(
        self, pairs: Iterator[tuple[Batch, Signal]], model: torch.nn.Module
    ) -> tuple[Any, Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor, Tensor]]]:
        """One stage's part of a microbatch, and its loss; see parallel.pipeline.run_pipeline."""
        batch, signal = next(pairs)

        def loss(hidden_and_head: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            hidden = hidden_and_head[0]
            if self.clock.part is not None and hidden.requires_grad:
                # Backward begins in the loss; where the gradient arrives here the model's own begins.
                hidden.register_hook(lambda _: self.clock.become(BACKWARD))
            with self.clock.during(LOSS):
                return self(hidden_and_head, batch, signal)

        return run_stage(model, batch), loss

    def __call__(
        self, hidden_and_head: tuple[Tensor, Tensor], batch: Batch, signal: Signal
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (loss sum with its gradient, sum of weights, record [5]: total, kd, ce, tokens and weights in fp64).

        Args:
            hidden_and_head: ([s, b, h], or [s/tp, b, h] under sequence parallelism; [v/tp, h]).
            batch: tokens, labels, loss_mask [b, s], the last with each token's weight, 0 where it does not count.
        """
        hidden, head = hidden_and_head
        sums = distillation_loss(
            hidden.flatten(0, 1),
            head,
            batch["labels"].t().reshape(-1),
            batch["loss_mask"].t().reshape(-1),
            signal,
            kd_weight=self.distill.kd_weight,
            ce_weight=self.distill.ce_weight,
            temperature=self.distill.temperature,
            # What is known of a few ids is at the teacher's temperature already.
            teacher_temperature=None if isinstance(signal, SparseSignal) else self.distill.teacher_temperature,
            temperature_squared=self.distill.temperature_squared,
            divergence=self.distill.loss,
            jsd_beta=self.distill.jsd_beta,
            skew_alpha=self.distill.skew_alpha,
            vocab_size=self.vocab_size,
            tp_group=self.tp_group,
            sequence_parallel=self.sequence_parallel,
            chunk_mib=self.distill.loss_chunk_mib,
            main_grad=head.main_grad if self.accumulate_main_grad else None,  # type: ignore[attr-defined]
        )
        figures = (sums.total, sums.kd, sums.ce, sums.num_tokens, sums.weight_sum)
        return sums.total, sums.weight_sum, torch.stack([figure.detach().double() for figure in figures])
