"""Cases for the kernels and what a process does with one; triton is imported by the functions that run kernels."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.losses import DenseSignal, distillation_loss
from megakd.losses.dense import DenseInputs
from megakd.losses.inputs import build_inputs
from megakd.losses.objective import Objective
from megakd.losses.rows import MergedRows
from megakd.losses.shards import VocabularyShard, build_shard
from tests.losses.reference import Answer, Case, relative, token_losses

BLOCK = 32  # several blocks per row, and lanes of the last that no column is left for


def logit_case(
    seed: int, *, rows: int = 4, padded: int = 80, vocab_size: int = 75, with_teacher: bool = True, **settings: Any
) -> Case:
    """A case whose hidden states are fp32 products and whose heads are unit matrices, so that no product rounds.

    Padded columns hold the largest numbers of all; the second row's label is -100.
    """
    generator = torch.Generator().manual_seed(seed)

    def products() -> Tensor:
        drawn = torch.randn(rows, padded, generator=generator) * 1.5
        drawn[:, vocab_size:] = 1e6
        return drawn

    labels = torch.randint(0, vocab_size, (rows,), generator=generator)
    weights = torch.ones(rows)
    labels[1], weights[1] = -100, 0.0
    head = torch.eye(padded)
    student, teacher = products(), products()
    return Case(
        student,
        head,
        labels,
        weights,
        teacher if with_teacher else None,
        head if with_teacher else None,
        vocab_size,
        **settings,
    )


@dataclasses.dataclass(frozen=True)
class Tokens:
    """kd and ce [n], and the gradient [n, v] of kd_factor * kd + ce_weight * ce with respect to the product."""

    kd: Tensor
    ce: Tensor
    gradient: Tensor


def expected_tokens(case: Case) -> Tokens:
    """The definition in fp64. A row of weight 0 has no label, and so counts without its cross-entropy."""
    product = case.hidden.double().requires_grad_()
    kd, ce = token_losses(case, product, case.head.double())
    factor = case.temperature**2 if case.temperature_squared else 1.0
    total = (case.kd_weight * factor * kd + case.ce_weight * ce * (case.token_weights != 0)).sum()
    return Tokens(kd.detach(), ce.detach(), torch.autograd.grad(total, product)[0])


def assert_tokens(case: Case, actual: Tokens, tolerance: float = 2e-6) -> None:
    expected, counted = expected_tokens(case), case.token_weights != 0
    assert relative(actual.kd, expected.kd) <= tolerance
    assert relative(actual.ce[counted], expected.ce[counted]) <= tolerance
    assert relative(actual.gradient[counted], expected.gradient[counted]) <= tolerance
    assert actual.gradient.isfinite().all() and actual.gradient[:, case.vocab_size :].abs().sum() == 0


def signal_of(case: Case) -> DenseSignal | None:
    if case.teacher_hidden is None or case.teacher_head is None:
        return None
    return DenseSignal(case.teacher_hidden, case.teacher_head)


def prepare(case: Case, shard: VocabularyShard | None = None) -> Objective:
    """The objective of a case, on a shard of its vocabulary."""
    objective = build_inputs(
        case.hidden,
        case.head,
        case.labels,
        case.token_weights,
        signal_of(case),
        **case.settings(),
        tp_group=None,
        sequence_parallel=False,
        chunk_mib=None,
    ).objective
    return objective if shard is None else dataclasses.replace(objective, shard=shard)


def build_work(case: Case, group: dist.ProcessGroup | None, step: int, block: int | None) -> Any:
    """TritonWork for chunks of `step` rows on this rank's shard."""
    from megakd.losses.kernels.work import TritonWork

    width = case.head.shape[0] // (1 if group is None else group.size())
    shard = build_shard(width, case.vocab_size, group)
    mine = slice(shard.first_id, shard.first_id + width)
    teacher_head = None if case.teacher_head is None else case.teacher_head[mine]
    inputs = DenseInputs(case.hidden, case.head[mine], case.labels, case.teacher_hidden, teacher_head)
    return TritonWork(prepare(case, shard), inputs, step, block=block)


def by_work(case: Case, group: dist.ProcessGroup | None = None, step: int = 3, block: int | None = BLOCK) -> Tokens:
    """A case in chunks of `step` rows by TritonWork."""
    work = build_work(case, group, step, block)
    chunks = []
    for start in range(0, len(case.labels), step):
        kd, ce, gradient = work.run(slice(start, min(start + step, len(case.labels))), True)
        chunks.append((kd, ce, gradient.clone()))  # the next call reuses it
    return Tokens(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def extreme_case(divergence: str, temperature: float) -> Case:
    """Logits in {-1e4, ..., 1e4}; the first of two shards has no mass in two rows, of the student alone."""
    case = logit_case(5, rows=4, padded=2 * 64, vocab_size=128, divergence=divergence, temperature=temperature)
    levels = torch.tensor([-1e4, -9990.0, -3.0, 0.0, 2.0, 9995.0, 1e4, 1e4])
    generator = torch.Generator().manual_seed(6)
    student, teacher = levels[torch.randint(0, len(levels), (2, 4, 128), generator=generator)]
    student[:2, :64] = -1e4
    return dataclasses.replace(case, hidden=student, teacher_hidden=teacher)


def in_bfloat16(case: Case) -> Case:
    names = ("hidden", "head", "teacher_hidden", "teacher_head")
    return dataclasses.replace(case, **{name: getattr(case, name).to(torch.bfloat16) for name in names})


def assert_rounded(case: Case, actual: Tokens, unit: float) -> None:
    """Gradients are right but for one rounding of `unit`, and losses are not rounded."""
    assert actual.gradient.dtype == torch.bfloat16 and actual.kd.dtype == torch.float32
    expected, counted = expected_tokens(case), case.token_weights != 0
    error = (actual.gradient.double() - expected.gradient).abs()[counted]
    assert (error <= 1.01 * unit * expected.gradient.abs()[counted] + 1e-6).all()
    assert relative(actual.kd, expected.kd) <= 2e-6


def without_gradient(case: Case) -> tuple[Tensor, Tensor, None]:
    return build_work(case, None, 3, BLOCK).run(slice(1, 3), False)


def by_hand(case: Case, tp_size: int) -> Tokens:
    """A case on `tp_size` shards one after the other, their figures merged without a process group."""
    from megakd.losses.kernels.gradient import write_gradient
    from megakd.losses.kernels.merge import merge_rows
    from megakd.losses.kernels.mixtures import mixture_sums
    from megakd.losses.kernels.statistics import row_statistics

    width = case.head.shape[0] // tp_size
    ranks = []
    for rank in range(tp_size):
        valid = min(max(case.vocab_size - rank * width, 0), width)
        shard = VocabularyShard(None, tp_size, rank, rank * width, width, valid, case.vocab_size)
        columns = slice(rank * width, (rank + 1) * width)
        assert case.teacher_hidden is not None
        logits = case.hidden[:, columns].contiguous(), case.teacher_hidden[:, columns].contiguous()
        objective = prepare(case, shard)
        ranks.append((objective, *logits, row_statistics(objective, *logits, case.labels, block=32)))
    gathered = torch.stack([figures for *_, figures in ranks])
    merged = [merge_rows(MergedRows(objective, gathered)) for objective, *_ in ranks]
    kd, offsets = merged[0].kd, [rows.offsets for rows in merged]
    if kd is None:
        sums = sum(
            mixture_sums(o, z, u, rows.shifts, block=32) for (o, z, u, _), rows in zip(ranks, merged, strict=True)
        )
        kd, offsets = sums[0, :, 0], [-sums[1]] * tp_size
    gradients = []
    for (o, z, u, _), rows, offset in zip(ranks, merged, offsets, strict=True):
        gradients.append(torch.full_like(z, torch.nan))
        write_gradient(o, z, u, case.labels, rows.shifts, offset, gradients[-1], block=32)
    return Tokens(kd, merged[0].ce, torch.cat(gradients, dim=1))


def figures_of(case: Case, shard: VocabularyShard | None) -> Tensor:
    from megakd.losses.kernels.statistics import row_statistics

    return row_statistics(prepare(case, shard), case.hidden, case.teacher_hidden, case.labels, block=BLOCK)


def softcapped_label_logits(values: Tensor, cap: float) -> Tensor:
    count = len(values)
    case = logit_case(11, rows=count, padded=1, vocab_size=1, with_teacher=False, kd_weight=0.0)
    case = dataclasses.replace(
        case, hidden=values.unsqueeze(1), labels=torch.zeros_like(case.labels), student_logit_softcap=cap
    )
    return figures_of(case, None)[0]


def padding_left_alone(case: Case) -> list[bool]:
    from megakd.losses.kernels.gradient import write_gradient
    from megakd.losses.kernels.merge import merge_rows
    from megakd.losses.kernels.mixtures import mixture_sums
    from megakd.losses.kernels.statistics import row_statistics

    def solved(fill: float) -> list[Tensor]:
        logits = [case.hidden.clone(), case.teacher_hidden.clone()]
        for buffer in logits:
            buffer[:, case.vocab_size :] = fill
        before = [buffer.clone() for buffer in logits]
        objective = prepare(case)
        figures = row_statistics(objective, *logits, case.labels, block=BLOCK)
        rows = merge_rows(MergedRows(objective, figures.unsqueeze(0)))
        sums = mixture_sums(objective, *logits, rows.shifts, block=BLOCK)
        gradient = torch.full_like(logits[0], torch.nan)
        write_gradient(objective, *logits, case.labels, rows.shifts, -sums[1], gradient, block=BLOCK)
        for now, then in zip(logits, before, strict=True):
            torch.testing.assert_close(now, then, rtol=0.0, atol=0.0, equal_nan=True)
        return [figures, sums, gradient]

    return [torch.equal(x, y) for x, y in zip(solved(0.0), solved(torch.nan), strict=True)]


def on_gloo(case: Case, rank: int, path: str) -> Tokens:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        return by_work(case, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def by_loss(case: Case) -> Answer:
    """A case by distillation_loss, as where there is a GPU."""
    from megakd.losses import work

    hidden, head = case.hidden.clone().requires_grad_(), case.head.clone().requires_grad_()
    with mock.patch.object(work, "kernels_available", lambda device: True):
        sums = distillation_loss(
            hidden, head, case.labels, case.token_weights, signal_of(case), **case.settings(), chunk_mib=1
        )
        sums.total.backward()
    return Answer(sums.total.detach(), sums.kd, sums.ce, hidden.grad, head.grad)
