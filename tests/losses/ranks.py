"""What a tensor rank does with a case: cut its shard, run the fused loss, hand back sums and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.losses import DenseSignal, SparseSignal, TokenStatistics, distillation_loss, token_statistics
from tests.losses.reference import Answer, Case, relative

LAYOUTS = [(1, False), (2, False), (2, True), (4, False), (4, True)]


def shard(tensor: Tensor, split: bool = True) -> Tensor:
    """This rank's part of dim 0."""
    if not split:
        return tensor.clone()
    return tensor.chunk(dist.get_world_size())[dist.get_rank()].clone()


def sharded_signal(case: Case, sequence_parallel: bool) -> DenseSignal | None:
    if case.teacher_hidden is None or case.teacher_head is None:
        return None
    return DenseSignal(shard(case.teacher_hidden, sequence_parallel), shard(case.teacher_head))


def fused_on_rank(
    case: Case, sequence_parallel: bool, chunk_mib: int = 1, signal: SparseSignal | None = None
) -> Answer:
    """The fused loss of this rank, against the case's teacher or a sparse signal; gradients are this rank's."""
    hidden = shard(case.hidden, sequence_parallel).requires_grad_()
    head = shard(case.head).requires_grad_()
    sums = distillation_loss(
        hidden,
        head,
        case.labels,
        case.token_weights,
        sharded_signal(case, sequence_parallel) if signal is None else signal,
        **case.settings(),
        tp_group=dist.group.WORLD,
        sequence_parallel=sequence_parallel,
        chunk_mib=chunk_mib,
    )
    sums.total.backward()
    assert sums.num_tokens.dtype == torch.int64 and sums.num_tokens == (case.token_weights != 0).sum()
    weight_sum = case.token_weights.double().sum()
    assert sums.weight_sum.dtype == torch.float64 and relative(sums.weight_sum, weight_sum) < 1e-15
    return Answer(sums.total.detach(), sums.kd, sums.ce, hidden.grad, head.grad)


def statistics_on_rank(case: Case, sequence_parallel: bool, signal: SparseSignal | None = None) -> TokenStatistics:
    return token_statistics(
        shard(case.hidden, sequence_parallel),
        shard(case.head),
        case.labels,
        case.token_weights,
        sharded_signal(case, sequence_parallel) if signal is None else signal,
        **{k: v for k, v in case.settings().items() if k not in ("kd_weight", "ce_weight", "temperature_squared")},
        tp_group=dist.group.WORLD,
        sequence_parallel=sequence_parallel,
        chunk_mib=1,
    )


def fused(
    run_ranks: Callable[..., list[Any]],
    case: Case,
    tp_size: int,
    sequence_parallel: bool,
    signal: SparseSignal | None = None,
) -> Answer:
    """The fused loss over `tp_size` ranks with whole gradients, after checking that the ranks agree."""
    answers = run_ranks(tp_size, fused_on_rank, case, sequence_parallel, 1, signal)
    for answer in answers[1:]:
        assert torch.equal(answer.total, answers[0].total)
        assert torch.equal(answer.kd, answers[0].kd) and torch.equal(answer.ce, answers[0].ce)
        assert sequence_parallel or torch.equal(answer.hidden_grad, answers[0].hidden_grad)
    first = answers[0]
    hidden_grad = torch.cat([a.hidden_grad for a in answers]) if sequence_parallel else first.hidden_grad
    return Answer(first.total, first.kd, first.ce, hidden_grad, torch.cat([a.head_grad for a in answers]))
