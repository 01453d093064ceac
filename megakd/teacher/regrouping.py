"""The student's microbatches as a teacher of another layout goes through them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.data.batches import Batch

_COLUMNS = ("tokens", "position_ids")


def regroup(
    microbatches: Sequence[Batch],
    group: dist.ProcessGroup,
    *,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> list[Batch]:
    """The same samples in microbatches of another size, dealt to other data ranks. Collective over `group`.

    Args:
        microbatches: this data rank's window; see data.batches.collate.
        group: the ranks of the student's data parallelism, which together have the window's samples.
        data_parallel_rank, data_parallel_size: the teacher's.

    Returns:
        microbatches with tokens and position_ids, the last of them filled up with the last sample where they are more
        than the window has, and where attention may end inside a sample cu_seqlens and
        max_seqlen; in the teacher's own order (see parallel.bridge).
    """
    samples = _samples_of_all(microbatches, group)
    unit = micro_batch_size * data_parallel_size
    missing = -len(samples["tokens"]) % unit  # only of evaluations
    if missing:
        samples = {name: torch.cat([rows, rows[-1:].expand(missing, -1)]) for name, rows in samples.items()}
    regrouped = []
    for start in range(0, len(samples["tokens"]), unit):
        first = start + data_parallel_rank * micro_batch_size
        part = slice(first, first + micro_batch_size)
        batch = {name: samples[name][part] for name in _COLUMNS}
        if "segments" in samples:
            batch = {name: tensor.reshape(1, -1) for name, tensor in batch.items()}
            # A token begins a stretch that is the first of its sample or numbered otherwise than the one before.
            numbers = samples["segments"][part]
            is_first = torch.ones_like(numbers, dtype=torch.bool)
            is_first[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
            edges = torch.cat([is_first.flatten().nonzero().squeeze(1), numbers.new_tensor([numbers.numel()])])
            batch["cu_seqlens"] = edges.to(torch.int32)
            batch["max_seqlen"] = edges.diff().max().cpu()
        regrouped.append(batch)
    return regrouped


def _samples_of_all(microbatches: Sequence[Batch], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """All samples of the window in their order, [samples, s] each; `segments` numbers a token's stretch."""
    rows = []
    for batch in microbatches:
        count = len(batch["sample_ids"])
        columns = [batch[name].view(count, -1) for name in _COLUMNS]
        if "cu_seqlens" in batch:
            columns.append(_stretches(batch).view(count, -1))
        rows.append(torch.stack(columns, 1))
    mine = torch.stack(rows)  # [microbatches, b, columns, s]
    # Ids and positions fit in 32 bits.
    mine = mine.to(torch.int32)
    gathered = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(gathered, mine, group=group)
    # Microbatch by microbatch, data rank by data rank within it.
    everything = torch.stack(gathered, 1).flatten(0, 2).to(torch.int64)
    names = [*_COLUMNS, "segments"]
    return {name: everything[:, index].contiguous() for index, name in enumerate(names[: everything.shape[1]])}


def _stretches(batch: Batch) -> Tensor:
    """Of each token, a number that is another than that of the stretch before it in its sample."""
    lengths = batch["cu_seqlens"].diff().to(torch.int64)
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
