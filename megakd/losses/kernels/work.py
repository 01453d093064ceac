"""A chunk of the dense losses on GPU: products by cuBLAS, everything elementwise in two or three kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from megakd.losses.dense import DenseInputs
from megakd.losses.kernels.gradient import write_gradient
from megakd.losses.kernels.merge import merge_rows
from megakd.losses.kernels.mixtures import mixture_sums
from megakd.losses.kernels.statistics import row_statistics
from megakd.losses.objective import Objective
from megakd.losses.products import project_
from megakd.losses.rows import MergedRows


class TritonWork:
    """Losses and gradients of chunks of rows; the host never waits for the device.

    A chunk's logits are written once by the products and read twice, three times where the divergence is from a
    mixture (jsd, the skewed ones, tvd) and twice then where no gradient is wanted; the gradient is written once.
    Memory for one chunk: 4 bytes per logit of either model, and the head's dtype per element of the gradient.
    """

    def __init__(self, objective: Objective, inputs: DenseInputs, rows: int, *, block: int | None = None) -> None:
        """Allocate for chunks of up to `rows` rows; raises TypeError for fp64, which the torch path computes.

        block: columns that a kernel's program treats together, a power of 2; a value for the GPU where left out.
        """
        if torch.float64 in (inputs.head.dtype, inputs.hidden.dtype):
            raise TypeError("The kernels compute in float32, but the head or its input is float64. Use the torch path.")
        assert (objective.divergence is None) == (inputs.teacher_hidden is None)
        self._objective, self._inputs, self._block = objective, inputs, block
        self._labels = inputs.labels.contiguous()
        self._student = inputs.hidden.new_empty((rows, objective.shard.width), dtype=torch.float32)
        self._teacher = None if inputs.teacher_hidden is None else torch.empty_like(self._student)
        self._gradient: Tensor | None = None

    def run(self, part: slice, want_gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """kd and ce of the rows `part`, fp32 [c], equal on all tensor ranks; and where wanted the gradient.

        gradient: [c, v/tp] in the head's dtype, of kd_factor * kd + ce_weight * ce per token with respect to hidden @
        head^T, without token weights, in memory that the next call reuses. One collective over the tensor ranks, or
        two where the divergence is from a mixture.
        """
        objective, inputs, block = self._objective, self._inputs, self._block
        labels = self._labels[part]
        student = self._student[: len(labels)]
        project_(student, inputs.hidden[part], inputs.head)
        teacher = None
        if self._teacher is not None and inputs.teacher_hidden is not None and inputs.teacher_head is not None:
            teacher = self._teacher[: len(labels)]
            project_(teacher, inputs.teacher_hidden[part], inputs.teacher_head)
        figures = row_statistics(objective, student, teacher, labels, block=block)
        rows = merge_rows(MergedRows(objective, objective.shard.gather_statistics(figures)))
        kd, offsets = rows.kd, rows.offsets
        if kd is None:
            assert teacher is not None
            sums = mixture_sums(objective, student, teacher, rows.shifts, block=block)
            sums = objective.shard.sum_statistics(sums)
            kd, offsets = sums[0].squeeze(1), -sums[1]
        if not want_gradient:
            return kd, rows.ce, None
        gradient = self._gradient_rows(len(labels))
        write_gradient(objective, student, teacher, labels, rows.shifts, offsets, gradient, block=block)
        return kd, rows.ce, gradient

    def _gradient_rows(self, count: int) -> Tensor:
        if self._gradient is None:
            self._gradient = torch.empty_like(self._student, dtype=self._inputs.head.dtype)
        return self._gradient[:count]
