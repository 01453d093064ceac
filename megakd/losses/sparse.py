"""The loss against a teacher of which k ids per token are known, a chunk of the student's logits at a time.

Columns are split in two: the ids of a row, a few figures that are worked on by themselves, and the outside, which
keeps one pass over the logits and a factor per row. So the outside's mass is a sum of its own and never 1 - Q.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megakd.losses.chunking import block_rows
from megakd.losses.objective import Objective
from megakd.losses.products import project_
from megakd.losses.rows import merge_sums
from megakd.losses.shards import SENTINEL
from megakd.losses.signals import SparseSignal


@dataclass(frozen=True)
class SparseTarget:
    """What a row's ids weigh: p [n, k] with 0 in empty slots, their sum, the tail beside them and p ln p + tail ln tail
    (or minus the teacher's entropy), [n] each; columns of empty slots are -1.
    """

    ids: Tensor
    p: Tensor
    total: Tensor
    tail: Tensor
    negative_entropy: Tensor


def build_target(signal: SparseSignal, counted: Tensor, vocab_size: int, dtype: torch.dtype) -> SparseTarget:
    """The target that the mode makes of a signal; rows not `counted` [n] that could not be one have no ids."""
    usable = ((signal.probabilities >= 0) & signal.probabilities.isfinite()) | (signal.ids < 0)
    usable &= signal.ids < vocab_size
    unusable = ~counted & ~usable.all(1)
    ids = signal.ids.masked_fill(unusable.unsqueeze(1), -1)
    empty = ids < 0
    p = signal.probabilities.to(dtype).masked_fill(empty, 0.0)
    total = p.sum(1)
    tail = torch.zeros_like(total)
    if signal.mode == "tail_bucket":
        tail = (1.0 - total).clamp(min=0.0).masked_fill((~empty).sum(1) >= vocab_size, 0.0)
    elif signal.mode == "renormalised":
        p = p / torch.where(total > 0, total, 1.0).unsqueeze(1)
        total = p.sum(1)
    if signal.mode == "sampled" and signal.entropy is not None:
        negative_entropy = -signal.entropy.to(dtype).masked_fill(~counted & ~signal.entropy.isfinite(), 0.0)
    else:
        negative_entropy = torch.xlogy(p, p).sum(1) + torch.xlogy(tail, tail)
    return SparseTarget(ids, p, total, tail, negative_entropy)


@dataclass(frozen=True)
class _Entries:
    """Some columns per row, [c, k] each: where they are in this shard, whether they are, and the logits z there."""

    columns: Tensor
    held: Tensor
    z: Tensor


class SparseWork:
    """Losses and gradients of chunks of rows against a sparse target, with memory for one chunk."""

    def __init__(
        self, objective: Objective, hidden: Tensor, head: Tensor, labels: Tensor, target: SparseTarget, rows: int
    ) -> None:
        width, dtype = objective.shard.width, target.p.dtype
        self.objective, self.hidden, self.head, self.labels, self.target = objective, hidden, head, labels, target
        self.logits = torch.empty((rows, width), dtype=dtype, device=hidden.device)
        # e^x alone would do where q is the same for the divergence and the cross-entropy and nothing needs x again.
        self.keeps_logits = objective.temperature != 1.0 or objective.student_form.softcap is not None
        count = 2 if self.keeps_logits else 0
        step = block_rows(rows, width, 1 + count, hidden.device, dtype.itemsize)
        self.step, self.scratch = step, self.logits.new_empty((count, step, width))

    def run(self, part: slice, want_gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """kd and ce of the rows `part`, [c] each, over the whole vocabulary; and where wanted the gradient by
        hidden @ head^T of tokens of weight 1, [c, v/tp], in memory that the next call reuses.
        """
        objective, shard = self.objective, self.objective.shard
        x = self.logits[: part.stop - part.start]
        project_(x, self.hidden[part], self.head)
        objective.student_form.apply_(x)
        shard.mask_(x)
        label = self._entries(x, self.labels[part].unsqueeze(1))
        entries = self._entries(x, self.target.ids[part])
        # Adding the sentinel swallows what was there, and adding 0 leaves columns that stand for another rank's ids.
        x.scatter_add_(1, entries.columns, torch.where(entries.held, SENTINEL, 0.0).to(x.dtype))
        p = self.target.p[part]
        figures = self._reduce(x, entries, label, p)
        gathered = shard.gather_statistics(figures).unbind(1)
        kd, ce, factors = self._merge(gathered, part)
        if want_gradient:
            self._write(x, entries, label, p, factors)
        return kd, ce, x if want_gradient else None

    def _entries(self, x: Tensor, ids: Tensor) -> _Entries:
        shard = self.objective.shard
        columns = ids - shard.first_id
        held = (columns >= 0) & (columns < shard.valid) & (ids >= 0)
        columns = columns.clamp(0, shard.width - 1)
        return _Entries(columns, held, x.gather(1, columns).masked_fill(~held, SENTINEL))

    def _blocks(self, x: Tensor) -> list[tuple[slice, list[Tensor]]]:
        parts = [slice(start, min(start + self.step, len(x))) for start in range(0, len(x), self.step)]
        return [(part, list(self.scratch[:, : part.stop - part.start].unbind())) for part in parts]

    def _reduce(self, x: Tensor, entries: _Entries, label: _Entries, p: Tensor) -> Tensor:
        """This rank's figures [8, c]: the label's logit; the outside's reference and with x = (z - reference) / T
        ln sum e^x; a reference of all columns, ln sum e^x and ln sum e^(T x) of them; sum p and sum p x of the ids.
        Leaves x of the outside in the place of its logits, exponentiated unless kept.
        """
        temperature = self.objective.temperature
        outside = x.new_empty((3, len(x), 1))
        reference, total, total_ce = outside.unbind()
        for part, scratch in self._blocks(x):
            torch.amax(x[part], 1, keepdim=True, out=reference[part])
            block = x[part].sub_(reference[part])
            if temperature != 1.0:
                block.mul_(1.0 / temperature)
            powers = torch.exp(block, out=scratch[0]) if self.keeps_logits else block.exp_()
            torch.sum(powers, 1, keepdim=True, out=total[part])
            if temperature != 1.0:
                torch.sum(torch.mul(block, temperature, out=scratch[0]).exp_(), 1, keepdim=True, out=total_ce[part])
        if temperature == 1.0:
            total_ce.copy_(total)
        highest = torch.maximum(reference, entries.z.amax(1, keepdim=True))
        # Where nothing is held, z is the sentinel: e^x must be 0 then, also in a shard that is all sentinels.
        known = torch.where(entries.held, (entries.z - highest) / temperature, SENTINEL)
        gap = (reference - highest) / temperature
        every = (gap.exp() * total + known.exp().sum(1, keepdim=True)).log_()
        every_ce = ((temperature * gap).exp() * total_ce + (temperature * known).exp().sum(1, keepdim=True)).log_()
        mine = p * entries.held
        dot = (mine * known.masked_fill(~entries.held, 0.0)).sum(1, keepdim=True)
        label_logit = label.z.masked_fill(~label.held, 0.0)
        mass = mine.sum(1, keepdim=True)
        columns = [label_logit, reference, total.log_(), highest, every, every_ce, mass, dot]
        return torch.cat(columns, dim=1).t().contiguous()

    def _merge(self, gathered: tuple[Tensor, ...], part: slice) -> tuple[Tensor, Tensor, _Factors]:
        """kd and ce [c], and what this rank's gradient needs."""
        target, temperature, mine = self.target, self.objective.temperature, self.objective.shard.tp_rank
        label_logits, references, log_sums, all_references, all_sums, all_sums_ce, masses, dots = gathered
        highest, total, shifts = merge_sums(all_references, all_sums, temperature)
        _, total_ce, shifts_ce = merge_sums(all_references, all_sums_ce)
        outside_highest, outside_total, outside_shifts = merge_sums(references, log_sums, temperature)
        ce = highest - label_logits.sum(0) + total_ce
        weight, tail = target.total[part], target.tail[part]
        log_q = (dots + masses * (all_references - highest) / temperature).sum(0) - weight * total
        log_outside = (outside_highest - highest) / temperature + outside_total - total
        kd = target.negative_entropy[part] - log_q - torch.where(tail > 0, tail * log_outside, 0.0)
        gap = (references[mine] - all_references[mine]) / temperature
        every = weight + tail
        factors = _Factors(
            reference=references[mine],
            outside=every * (gap + shifts[mine]).exp() - tail * outside_shifts[mine].exp(),
            outside_ce=(temperature * gap + shifts_ce[mine]).exp(),
            ids=every,
            highest=all_references[mine],
            shift=shifts[mine],
            shift_ce=shifts_ce[mine],
        )
        return kd, ce, factors

    def _write(self, x: Tensor, entries: _Entries, label: _Entries, p: Tensor, factors: _Factors) -> None:
        """Overwrite x with the gradient: one factor per row outside, then the ids and the label by themselves."""
        objective, temperature = self.objective, self.objective.temperature
        form = objective.student_form
        kd, ce = objective.kd_slope * form.scale, objective.ce_weight * form.scale
        outside, outside_ce = (kd * factors.outside).unsqueeze(1), (ce * factors.outside_ce).unsqueeze(1)
        for part, scratch in self._blocks(x):
            block = x[part]
            if not self.keeps_logits:
                block.mul_((outside + outside_ce)[part])
                continue
            if form.softcap is not None:
                offset = factors.reference[part].unsqueeze(1)
                form.softcap_slope(block, temperature, offset, scratch[1])
            torch.mul(block, temperature, out=scratch[0]).exp_().mul_(outside_ce[part])
            block.exp_().mul_(outside[part]).add_(scratch[0])
            if form.softcap is not None:
                block.mul_(scratch[1])
        known = (entries.z - factors.highest.unsqueeze(1)) / temperature
        q = (known + factors.shift.unsqueeze(1)).exp()
        q_ce = (temperature * known + factors.shift_ce.unsqueeze(1)).exp()
        at_ids = kd * (factors.ids.unsqueeze(1) * q - p) + ce * q_ce
        at_label = torch.full_like(label.z, -ce)
        for where, value in ((entries, at_ids), (label, at_label)):
            if form.softcap is not None:
                value = value * (1.0 - (where.z / form.softcap).clamp(-1.0, 1.0).square())
            x.scatter_add_(1, where.columns, value.masked_fill(~where.held, 0.0))


@dataclass(frozen=True)
class _Factors:
    """Per row [c]: outside, e^x with x = (z - reference) / T is multiplied by `outside` for kd, and e^(T x) by
    `outside_ce`. On the ids, with y = (z - highest) / T, y + shift is ln q, where q counts `ids` times, and
    T y + shift_ce is ln q at T = 1.
    """

    reference: Tensor
    outside: Tensor
    outside_ce: Tensor
    ids: Tensor
    highest: Tensor
    shift: Tensor
    shift_ce: Tensor
