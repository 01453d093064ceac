"""The student's microbatches as a teacher of another layout on the same ranks goes through them.

A rank of the teacher gets the samples that it lacks from one of the ranks that read them, and where only the first
stage looks at tokens no other gets any: a few bytes per token and tensor rank, however many ranks there are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.data.batches import Batch
from megakd.parallel.mesh import ModelMesh

_COLUMNS = ("tokens", "position_ids")


@dataclass(frozen=True)
class Placement:
    """One of two models on the same ranks: how it lies there and what it goes through at a time."""

    mesh: ModelMesh
    micro_batch_size: int

    def data_rank(self, sample: int) -> int:
        """The data rank that goes through a sample of a window; see parallel.pieces."""
        return sample // self.micro_batch_size % self.mesh.dp_size

    def data_rank_of(self, rank: int) -> int:
        """The data rank that a rank of the world belongs to."""
        return self.mesh.ranks.index(rank) // self.mesh.tp_size % self.mesh.dp_size

    def holders(self, data_rank: int) -> list[int]:
        """The ranks of all its stages, in their order."""
        tp, dp = self.mesh.tp_size, self.mesh.dp_size
        firsts = range(data_rank * tp, len(self.mesh.ranks), dp * tp)
        return [self.mesh.ranks[first + t] for first in firsts for t in range(tp)]


def regroup(microbatches: Sequence[Batch], student: Placement, teacher: Placement) -> list[Batch]:
    """The same samples in the teacher's microbatches, dealt to its data ranks. Collective over the world.

    Args:
        microbatches: this rank's of a window, as the student goes through them; see data.batches.collate.

    Returns:
        microbatches with tokens and position_ids (zeros away from the first stage where nobody looks at them), and
        where attention may end inside a sample cu_seqlens and max_seqlen; in the teacher's own order (see
        parallel.pieces), the last of them filled up with the last sample where they are more than the window has.
    """
    mine = _rows(microbatches, student)
    count = len(mine) * student.mesh.dp_size
    packed = "cu_seqlens" in microbatches[0]
    unit = teacher.micro_batch_size * teacher.mesh.dp_size
    places = [min(place, count - 1) for place in range(-(-count // unit) * unit)]  # beyond it only of evaluations
    needed = _exchange(mine, places, student, teacher, everywhere=packed)
    regrouped = []
    for start in range(0, len(places), unit):
        first = start + teacher.mesh.dp_rank * teacher.micro_batch_size
        samples = [needed[place] for place in places[first : first + teacher.micro_batch_size]]
        columns = torch.stack(samples, 1).to(torch.int64)  # [columns, b, s]
        batch = dict(zip(_COLUMNS, columns, strict=False))
        if packed:
            batch = {name: tensor.reshape(1, -1) for name, tensor in batch.items()}
            # A token begins a stretch that is the first of its sample or numbered otherwise than the one before.
            numbers = columns[len(_COLUMNS)]
            is_first = torch.ones_like(numbers, dtype=torch.bool)
            is_first[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
            edges = torch.cat([is_first.flatten().nonzero().squeeze(1), numbers.new_tensor([numbers.numel()])])
            batch["cu_seqlens"] = edges.to(torch.int32)
            batch["max_seqlen"] = edges.diff().max().cpu()
        regrouped.append(batch)
    return regrouped


def _rows(microbatches: Sequence[Batch], student: Placement) -> dict[int, Tensor]:
    """This rank's samples by their place in the window, [columns, s] each: tokens, positions, numbers of stretches."""
    rows = {}
    unit = student.micro_batch_size * student.mesh.dp_size
    for number, batch in enumerate(microbatches):
        count = len(batch["sample_ids"])
        columns = [batch[name].view(count, -1) for name in _COLUMNS]
        if "cu_seqlens" in batch:
            columns.append(_stretches(batch).view(count, -1))
        # Ids and positions fit in 32 bits.
        samples = torch.stack(columns, 1).to(torch.int32)
        first = number * unit + student.mesh.dp_rank * student.micro_batch_size
        rows.update({first + row: sample for row, sample in enumerate(samples)})
    return rows


def _exchange(
    mine: dict[int, Tensor], places: Sequence[int], student: Placement, teacher: Placement, *, everywhere: bool
) -> dict[int, Tensor]:
    """The rows of the samples that this rank's part of the teacher goes through, by their place in the window.

    Args:
        places: which sample stands in each place of the teacher's microbatches.
        everywhere: every stage looks at them, not the first alone.
    """
    me, dp_rank = dist.get_rank(), teacher.mesh.dp_rank
    readers: dict[int, set[int]] = defaultdict(set)  # the teacher's data ranks, by sample
    for place, sample in enumerate(places):
        readers[sample].add(teacher.data_rank(place))
    stages = None if everywhere else teacher.mesh.tp_size
    looking = {number: teacher.holders(number)[:stages] for number in range(teacher.mesh.dp_size)}
    leaving: dict[int, list[int]] = defaultdict(list)
    for sample in sorted(mine):
        for rank in (rank for data_rank in sorted(readers[sample]) for rank in looking[data_rank]):
            lacks = student.data_rank_of(rank) != student.data_rank(sample)
            if lacks and _source(sample, rank, student, teacher) == me:
                leaving[rank].append(sample)
    wanted = sorted(sample for sample, data_ranks in readers.items() if dp_rank in data_ranks)
    coming: dict[int, list[int]] = defaultdict(list)
    for sample in wanted:
        if sample not in mine and me in looking[dp_rank]:
            coming[_source(sample, me, student, teacher)].append(sample)
    like = next(iter(mine.values()))
    sent = {rank: torch.stack([mine[sample] for sample in samples]) for rank, samples in leaving.items()}
    received = {rank: like.new_empty(len(samples), *like.shape) for rank, samples in coming.items()}
    operations = [dist.P2POp(dist.isend, tensor, rank) for rank, tensor in sorted(sent.items())]
    operations += [dist.P2POp(dist.irecv, tensor, rank) for rank, tensor in sorted(received.items())]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    needed = {sample: mine.get(sample, torch.zeros_like(like)) for sample in wanted}
    for rank, samples in coming.items():
        needed.update(zip(samples, received[rank], strict=True))
    return needed


def _source(sample: int, rank: int, student: Placement, teacher: Placement) -> int:
    """The rank that sends a sample to one that lacks it; others send it to others."""
    holders = student.holders(student.data_rank(sample))
    return holders[teacher.mesh.ranks.index(rank) % len(holders)]


def _stretches(batch: Batch) -> Tensor:
    """Of each token, a number that is another than that of the stretch before it in its sample."""
    lengths = batch["cu_seqlens"].diff().to(torch.int64)
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
