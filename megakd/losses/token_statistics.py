"""Per-token figures for evaluation, chunk by chunk as the loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megakd.losses.dense import DenseWork
from megakd.losses.inputs import LossInputs, build_inputs
from megakd.losses.rows import merge_sums
from megakd.losses.shards import VocabularyShard
from megakd.losses.signals import DenseSignal, SparseSignal, TokenStatistics
from megakd.losses.work import build_work, gather_dense


@torch.no_grad()
def token_statistics(
    student_hidden: Tensor,
    student_head: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    signal: DenseSignal | SparseSignal | None,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    divergence: str = "forward_kl",
    jsd_beta: float | None = None,
    skew_alpha: float | None = None,
    student_logit_scale: float = 1.0,
    student_logit_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_logit_softcap: float | None = None,
    tp_group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_mib: int | None = None,
) -> TokenStatistics:
    """What `distillation_loss` sums, token by token, and whether teacher and student agree on the likeliest id.

    Inputs are those of `distillation_loss`; token_weights only tell which labels count: rows of weight 0 hold finite
    figures without meaning where their label is outside the vocabulary. Raises as `distillation_loss` does.
    """
    inputs = build_inputs(
        student_hidden,
        student_head,
        labels,
        token_weights,
        signal,
        kd_weight=0.0,
        ce_weight=1.0,
        vocab_size=vocab_size,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        temperature_squared=False,
        divergence=divergence,
        jsd_beta=jsd_beta,
        skew_alpha=skew_alpha,
        student_logit_scale=student_logit_scale,
        student_logit_softcap=student_logit_softcap,
        teacher_logit_scale=teacher_logit_scale,
        teacher_logit_softcap=teacher_logit_softcap,
        tp_group=tp_group,
        sequence_parallel=sequence_parallel,
        chunk_mib=chunk_mib,
    )
    count = labels.shape[0]
    figures = torch.empty((3, count), dtype=inputs.dtype, device=student_hidden.device)
    agree = torch.empty(count, dtype=torch.bool, device=student_hidden.device)
    hidden, head = inputs.rows(student_hidden), student_head.detach()
    fill = _fill_dense if isinstance(signal, DenseSignal) else _fill
    fill(inputs, hidden, head, figures, agree)
    kd, ce, teacher_ce = figures.unbind()
    if not isinstance(signal, DenseSignal):
        return TokenStatistics(kd, ce, None, None)
    return TokenStatistics(kd, ce, teacher_ce, agree)


def _fill(inputs: LossInputs, hidden: Tensor, head: Tensor, figures: Tensor, agree: Tensor) -> None:
    """Write kd and ce to the first two of figures [3, n]."""
    work = build_work(inputs, hidden, head)
    for part in inputs.chunks():
        figures[0, part], figures[1, part], _ = work.run(part, want_gradient=False)


def _fill_dense(inputs: LossInputs, hidden: Tensor, head: Tensor, figures: Tensor, agree: Tensor) -> None:
    """Write kd, ce and teacher_ce to figures [3, n], and agree [n]."""
    # In torch on every device: the kernels leave no masked logits to compare.
    work = DenseWork(inputs.objective, gather_dense(inputs, hidden, head), inputs.chunk_rows, inputs.dtype)
    shard = inputs.objective.shard
    for part in inputs.chunks():
        logits, teacher_logits = work.project(part)
        assert teacher_logits is not None
        agree[part] = _likeliest(shard, logits) == _likeliest(shard, teacher_logits)
        figures[2, part] = _cross_entropy(shard, teacher_logits, inputs.labels[part], work.scratch[0])
        figures[0, part], figures[1, part], _ = work.reduce(part, want_gradient=False)


def _likeliest(shard: VocabularyShard, logits: Tensor) -> Tensor:
    """The global id [c] of each row's largest logit [c, v/tp], the lowest among equals."""
    value, column = logits.max(1)
    # Ids travel beside the logits in their dtype: fp32 counts exactly to 16.7 million.
    pairs = shard.gather_statistics(torch.stack([value, (column + shard.first_id).to(value.dtype)], dim=1))
    owner = pairs[:, :, 0].max(0).indices  # the first among equal ranks, which holds the lower ids
    return pairs[:, :, 1].gather(0, owner.unsqueeze(0)).squeeze(0)


def _cross_entropy(shard: VocabularyShard, logits: Tensor, labels: Tensor, scratch: Tensor) -> Tensor:
    """-ln softmax(logits)[label], [c]; leaves the logits [c, v/tp] alone."""
    columns, held = shard.locate(labels)
    label_logit = logits.gather(1, columns).mul_(held).squeeze(1)
    maximum = logits.amax(1, keepdim=True)
    log_sums = []
    for block, top in zip(torch.split(logits, len(scratch)), torch.split(maximum, len(scratch)), strict=True):
        log_sums.append(torch.sub(block, top, out=scratch[: len(block)]).exp_().sum(1).log_())
    figures = torch.stack([label_logit, maximum.squeeze(1), torch.cat(log_sums)], dim=1)
    gathered = shard.gather_statistics(figures).unbind(2)
    highest, total, _ = merge_sums(gathered[1], gathered[2])
    return highest - gathered[0].sum(0) + total
