"""Which code works on the chunks of a call."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megakd.losses.dense import DenseInputs, DenseWork
from megakd.losses.inputs import LossInputs
from megakd.losses.kernels import kernels_available
from megakd.losses.signals import SparseSignal
from megakd.losses.sparse import SparseWork, build_target


class ChunkWork(Protocol):
    """Losses and gradients of rows, in memory for one chunk of them."""

    def run(self, part: slice, want_gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """kd and ce of the rows `part`, [c] each, over the whole vocabulary; and where wanted the gradient by
        hidden @ head^T of tokens of weight 1, [c, v/tp], in memory that the next call reuses.
        """


def build_work(inputs: LossInputs, hidden: Tensor, head: Tensor) -> ChunkWork:
    """The work on a call's chunks; hidden [n, h] and head [v/tp, h] are the student's, detached."""
    if isinstance(inputs.signal, SparseSignal):
        counted = inputs.token_weights != 0
        target = build_target(inputs.signal, counted, inputs.objective.shard.vocab_size, inputs.dtype)
        return SparseWork(inputs.objective, hidden, head, inputs.labels, target, inputs.chunk_rows)
    dense = gather_dense(inputs, hidden, head)
    if kernels_available(hidden.device) and inputs.dtype == torch.float32:
        # Triton is imported only where its kernels run.
        from megakd.losses.kernels.work import TritonWork

        return TritonWork(inputs.objective, dense, inputs.chunk_rows)
    return DenseWork(inputs.objective, dense, inputs.chunk_rows, inputs.dtype)


def gather_dense(inputs: LossInputs, hidden: Tensor, head: Tensor) -> DenseInputs:
    """What a call against whole distributions, or on the cross-entropy alone, works on."""
    signal = inputs.signal
    assert not isinstance(signal, SparseSignal)
    if signal is None:
        return DenseInputs(hidden, head, inputs.labels, None, None)
    teacher_head = fit_rows(signal.head.detach(), len(head))
    return DenseInputs(hidden, head, inputs.labels, inputs.rows(signal.hidden, signal.is_spread), teacher_head)


def fit_rows(head: Tensor, rows: int) -> Tensor:
    """A head cut to `rows`, or padded with zeros: rows beyond the vocabulary take part in nothing."""
    if len(head) >= rows:
        return head[:rows]
    return torch.nn.functional.pad(head, (0, 0, 0, rows - len(head)))
