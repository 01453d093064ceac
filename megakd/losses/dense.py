"""The loss against a teacher's whole distributions: both models' logits, a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megakd.losses.chunking import block_rows
from megakd.losses.objective import Objective
from megakd.losses.passes import Block, evaluate_block, reduce_block, scratch_count, write_block
from megakd.losses.products import project_
from megakd.losses.rows import MergedRows, RowFactors

# Merging figures costs the same whatever their number; what it takes to hide it still fits a CPU's last cache.
_BLOCKS_PER_PIECE = 4


@dataclass(frozen=True)
class DenseInputs:
    """All n rows on every tensor rank: hidden [n, h], head [v/tp, h], labels [n], the same of a teacher or None."""

    hidden: Tensor
    head: Tensor
    labels: Tensor
    teacher_hidden: Tensor | None
    teacher_head: Tensor | None


class DenseWork:
    """Losses and gradients of chunks of rows in torch, with memory for one chunk.

    Elementwise work goes block by block, small enough for a core's cache. Without other tensor ranks to hear from, the
    gradient of a few blocks is written before the next ones are read.
    """

    def __init__(self, objective: Objective, inputs: DenseInputs, rows: int, dtype: torch.dtype) -> None:
        width, device = objective.shard.width, inputs.hidden.device
        self.objective, self.inputs = objective, inputs
        self.student = torch.empty((rows, width), dtype=dtype, device=device)
        self.teacher = None if objective.divergence is None else torch.empty_like(self.student)
        count = scratch_count(objective)
        block = block_rows(rows, width, count + (1 if self.teacher is None else 2), device, dtype.itemsize)
        self.scratch = self.student.new_empty((count, block, width))

    def run(self, part: slice, want_gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """kd and ce of the rows `part`, [c] each, over the whole vocabulary; and where wanted the gradient by
        hidden @ head^T of tokens of weight 1, [c, v/tp], in memory that the next call reuses.
        """
        self.project(part)
        return self.reduce(part, want_gradient)

    def project(self, part: slice) -> tuple[Tensor, Tensor | None]:
        """Both models' logits [c, v/tp] of the rows, masked outside the vocabulary."""
        inputs, objective, count = self.inputs, self.objective, part.stop - part.start
        z = self.student[:count]
        project_(z, inputs.hidden[part], inputs.head)
        objective.student_form.apply_(z)
        objective.shard.mask_(z)
        if self.teacher is None or inputs.teacher_hidden is None or inputs.teacher_head is None:
            return z, None
        u = self.teacher[:count]
        project_(u, inputs.teacher_hidden[part], inputs.teacher_head)
        objective.teacher_form.apply_(u)
        objective.shard.mask_(u)
        return z, u

    def reduce(self, part: slice, want_gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """`run` for the rows that `project` was just called for."""
        objective, z = self.objective, self.student[: part.stop - part.start]
        columns, held = objective.shard.locate(self.inputs.labels[part])
        at_label = held.to(z.dtype) * (-objective.ce_weight * objective.student_form.scale)
        figures = z.new_empty((4 if objective.divergence is None else 7, len(z)))
        torch.mul(z.gather(1, columns), held, out=figures[0].unsqueeze(1))
        kd = torch.zeros_like(figures[0])
        separable = objective.divergence is None or objective.divergence.separable
        for piece, blocks in self._pieces(len(z)):
            merged = self._reduce(blocks, figures[:, piece])
            factors = merged.factors() if want_gradient or objective.second_round else None
            if not separable:
                kd[piece], factors = self._diverge(blocks, merged, factors)
            if factors is not None and want_gradient:
                for block in blocks:
                    write_block(objective, block, (columns[piece], at_label[piece]), factors)
        if objective.shard.tp_size == 1:
            merged = MergedRows(objective, figures.unsqueeze(0))  # all pieces
        if objective.divergence is not None and separable:
            kd = merged.divergences()[0]
        return kd, merged.cross_entropies(), z if want_gradient else None

    def _pieces(self, count: int) -> Iterator[tuple[slice, list[Block]]]:
        """Rows whose figures are merged together, in blocks: all of a chunk, or a few blocks on a single rank."""
        step, objective = self.scratch.shape[1], self.objective
        size = count if objective.shard.tp_size > 1 else _BLOCKS_PER_PIECE * step
        for start in range(0, count, size):
            piece = slice(start, min(start + size, count))
            parts = [slice(first, min(first + step, piece.stop)) for first in range(start, piece.stop, step)]
            yield piece, [self._block(part, start) for part in parts]

    def _block(self, rows: slice, start: int) -> Block:
        scratch = list(self.scratch[:, : rows.stop - rows.start].unbind())
        teacher = None if self.teacher is None else self.teacher[rows]
        return Block(slice(rows.start - start, rows.stop - start), self.student[rows], teacher, scratch)

    def _reduce(self, blocks: list[Block], figures: Tensor) -> MergedRows:
        """The first round: fill this rank's figures [k, c], hear the others'."""
        objective, divergence = self.objective, self.objective.divergence
        columns = figures[1:].unsqueeze(2)
        for block in blocks:
            reduce_block(objective, block, columns[:, block.part].unbind())
        if divergence is not None:
            figures[6].div_(figures[5 if divergence.separable else 2])
            figures[5].log_()
        figures[2:4].log_()
        return MergedRows(objective, objective.shard.gather_statistics(figures))

    def _diverge(
        self, blocks: list[Block], merged: MergedRows, factors: RowFactors | None
    ) -> tuple[Tensor, RowFactors | None]:
        """kd [c], and the factors with their offset; the second round where there is one."""
        if not self.objective.second_round:
            kd, offset = merged.divergences()
            return kd, factors if factors is None else replace(factors, offset=offset)
        assert factors is not None
        sums = merged.figures.new_empty((2, merged.figures.shape[2], 1))
        for block in blocks:
            evaluate_block(self.objective, block, factors, sums[:, block.part])
        self.objective.shard.sum_statistics(sums)
        return sums[0].squeeze(1), replace(factors, offset=-sums[1])
