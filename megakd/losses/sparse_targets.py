"""What a sparse signal keeps of a teacher: draws from its distribution, or its k largest probabilities.

Logits exist a chunk of rows at a time. Masses are summed in fp64, in blocks of columns whose sums lead a point of the
cumulative distribution to its block and then to its id.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megakd.losses.chunking import block_rows, chunk_rows
from megakd.losses.products import project_
from megakd.losses.shards import VocabularyShard, build_shard, compute_dtype

_COLUMNS = 32  # of a block: as few as to make a search in it cheap, as many as to make blocks few
_SEARCHED = 1 << 20  # columns looked at together


class Draws(NamedTuple):
    """ids: [n, N] int64, ascending in a row, with repeats; entropy: [n] fp64, of the whole distribution, in nats."""

    ids: Tensor
    entropy: Tensor


class Largest(NamedTuple):
    """ids: [n, k] int64 and log_probabilities [n, k] fp64, largest first; log_odds: [n] fp64.

    The log-odds ln(P / (1 - P)) of the ids' mass P keep what is left beside them exact; infinite where nothing is.
    """

    ids: Tensor
    log_probabilities: Tensor
    log_odds: Tensor


@torch.no_grad()
def draw_systematically(
    hidden: Tensor,
    head: Tensor,
    offsets: Tensor,
    *,
    num_samples: int,
    vocab_size: int,
    temperature: float = 1.0,
    tp_group: ProcessGroup | None = None,
    chunk_mib: int | None = None,
) -> Draws:
    """N equally spaced points through each row's cumulative distribution, softmax(hidden head^T / temperature).

    Systematic sampling: an id is drawn N p times, rounded down or up, and on average exactly N p times where the
    offset is uniform. Equal logits and offsets give equal draws whatever the number of tensor ranks, but for points
    that the rounding of fp64 moves over a border between ids.

    hidden: [n, h] on every tensor rank; head: [v/tp, h].
    offsets: [n] fp64 in [0, 1), of the first point in steps of 1/N.

    Returns the same on every tensor rank. Raises ValueError for a size or a temperature that cannot be.
    """
    _check(num_samples, "num_samples", temperature)
    shard = build_shard(head.shape[0], vocab_size, tp_group)
    count = hidden.shape[0]
    ids = torch.zeros((count, num_samples), dtype=torch.int64, device=hidden.device)
    entropy = torch.empty(count, dtype=torch.float64, device=hidden.device)
    steps = torch.arange(num_samples, dtype=torch.float64, device=hidden.device)
    for part, x in _chunks(hidden, head, shard, temperature, chunk_mib):
        blocks, dot = _masses(x, with_dot=True)
        sums = blocks.cumsum(1)
        gathered = shard.gather_statistics(torch.stack([sums[:, -1], dot], dim=1))  # [tp, c, 2]
        ends = gathered[:, :, 0].cumsum(0)
        total = ends[-1]
        entropy[part] = (total.log() - gathered[:, :, 1].sum(0) / total).clamp_(min=0.0)
        points = (steps + offsets[part].unsqueeze(1)) * (total / num_samples).unsqueeze(1)
        points = torch.minimum(points, _below(total).unsqueeze(1))
        end = ends[shard.tp_rank].unsqueeze(1)
        begin = ends[shard.tp_rank - 1].unsqueeze(1) if shard.tp_rank else torch.zeros_like(end)
        mine = (points >= begin) & (points < end)
        ids[part] = torch.where(mine, _search(x, sums, points - begin) + shard.first_id, 0)
    return Draws(shard.sum_statistics(ids), entropy)


@torch.no_grad()
def find_largest(
    hidden: Tensor,
    head: Tensor,
    *,
    k: int,
    vocab_size: int,
    temperature: float = 1.0,
    tp_group: ProcessGroup | None = None,
    chunk_mib: int | None = None,
) -> Largest:
    """The k largest of softmax(hidden head^T / temperature) and the mass they have; arguments as draw_systematically.

    Returns the same on every tensor rank. Raises ValueError for a size or a temperature that cannot be.
    """
    _check(k, "k", temperature)
    if k > vocab_size:
        raise ValueError(f"k is {k}; it must be at most vocab_size, {vocab_size}.")
    shard = build_shard(head.shape[0], vocab_size, tp_group)
    count = hidden.shape[0]
    ids = torch.empty((count, k), dtype=torch.int64, device=hidden.device)
    log_probabilities = torch.empty((count, k), dtype=torch.float64, device=hidden.device)
    log_odds = torch.empty(count, dtype=torch.float64, device=hidden.device)
    for part, x in _chunks(hidden, head, shard, temperature, chunk_mib):
        blocks, _ = _masses(x, with_dot=False)
        total = shard.gather_statistics(blocks.sum(1, keepdim=True)).sum(0).squeeze(1)
        values, columns = _top_columns(x, min(k, shard.width))
        if shard.tp_size > 1:
            values = torch.cat(shard.gather_statistics(values).unbind(), dim=1)
            columns = torch.cat(shard.gather_statistics(columns + shard.first_id).unbind(), dim=1)
            values, places = values.topk(k, dim=1)
            columns = columns.gather(1, places)
        values = values.double()
        kept = values.exp().sum(1)
        left = torch.zeros_like(total) if k == vocab_size else (total - kept).clamp_(min=0.0)
        ids[part], log_probabilities[part] = columns, values - total.log().unsqueeze(1)
        log_odds[part] = kept.log() - left.log()
    return Largest(ids, log_probabilities, log_odds)


def _check(count: int, name: str, temperature: float) -> None:
    if count < 1:
        raise ValueError(f"{name} is {count}; it must be at least 1.")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be > 0.")


def _chunks(
    hidden: Tensor, head: Tensor, shard: VocabularyShard, temperature: float, chunk_mib: int | None
) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of rows and their logits over the temperature [c, v/tp], less the row's largest over all ranks; the
    sentinel in columns that do not exist. The next chunk reuses the memory.
    """
    count, width = hidden.shape[0], shard.width
    dtype = compute_dtype(hidden, head)
    device_type = hidden.device.type
    rows = chunk_rows(count, width, device_type=device_type, chunk_mib=chunk_mib, element_size=dtype.itemsize, models=1)
    buffer = torch.empty((rows, width), dtype=dtype, device=hidden.device)
    for start in range(0, count, max(rows, 1)):
        part = slice(start, min(start + rows, count))
        x = buffer[: part.stop - part.start]
        project_(x, hidden[part], head)
        if temperature != 1.0:
            x.mul_(1.0 / temperature)
        shard.mask_(x)
        highest = x.amax(1, keepdim=True)
        if shard.tp_size > 1:
            # Before anything is exponentiated: every rank count then has the same e^x.
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=shard.group)
        yield part, x.sub_(highest)


def _masses(x: Tensor, *, with_dot: bool) -> tuple[Tensor, Tensor]:
    """Sums of e^x [c, blocks] in fp64, and sum e^x x [c] over this shard, or zeros."""
    rows, width = x.shape
    count = -(-width // _COLUMNS)
    blocks = torch.empty((rows, count), dtype=torch.float64, device=x.device)
    dot = torch.zeros(rows, dtype=torch.float64, device=x.device)
    step = block_rows(rows, width, 4, x.device, x.element_size())
    powers = torch.empty((min(step, rows), width), dtype=x.dtype, device=x.device)
    exact = torch.zeros((min(step, rows), count * _COLUMNS), dtype=torch.float64, device=x.device)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        block, size = x[part], part.stop - start
        e = torch.exp(block, out=powers[:size])
        wide = exact[:size]
        wide[:, :width].copy_(e)
        torch.sum(wide.view(size, count, _COLUMNS), 2, out=blocks[part])
        if with_dot:
            dot[part] = torch.linalg.vecdot(e, block).double()
    return blocks, dot


def _below(values: Tensor) -> Tensor:
    return torch.nextafter(values, torch.zeros_like(values))


def _search(x: Tensor, sums: Tensor, points: Tensor) -> Tensor:
    """The columns [c, N] at points of the cumulative sum of e^x, summed by block in `sums`; any for points outside.

    A column of no mass is never found.
    """
    found = torch.empty(points.shape, dtype=torch.int64, device=x.device)
    step = max(1, _SEARCHED // (points.shape[1] * _COLUMNS))
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        found[part] = _search_rows(x[part], sums[part], points[part])
    return found


def _search_rows(x: Tensor, sums: Tensor, points: Tensor) -> Tensor:
    width = x.shape[1]
    points = torch.minimum(points.clamp(min=0.0), _below(sums[:, -1:]).clamp(min=0.0))
    block = torch.searchsorted(sums, points, right=True).clamp_(max=sums.shape[1] - 1)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    columns = block.unsqueeze(2) * _COLUMNS + torch.arange(_COLUMNS, device=x.device)  # [c, N, columns]
    inside = columns < width
    flat = columns.clamp(max=width - 1).flatten(1)
    mass = x.gather(1, flat).view(columns.shape).exp().double().masked_fill(~inside, 0.0)
    passed = mass.cumsum(2) <= (points - before).unsqueeze(2)
    # The block's own sum and the sum of its columns may round apart: the last column with mass takes what is over.
    last = torch.where(mass > 0, torch.arange(_COLUMNS, device=x.device), 0).amax(2)
    return block * _COLUMNS + torch.minimum(passed.sum(2), last)


def _top_columns(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns, [c, k] each.

    They are in the k blocks with the largest maxima: where those are few, only they are searched.
    """
    rows, width = x.shape
    count = width // _COLUMNS
    if count <= 2 * k:
        values, columns = x.topk(k, dim=1)
        return values, columns
    whole = count * _COLUMNS
    maxima = x[:, :whole].unflatten(1, (count, _COLUMNS)).amax(2)
    block = maxima.topk(k, dim=1).indices
    columns = (block.unsqueeze(2) * _COLUMNS + torch.arange(_COLUMNS, device=x.device)).flatten(1)
    rest = torch.arange(whole, width, device=x.device).expand(rows, -1)
    columns = torch.cat([columns, rest], dim=1)
    values, places = x.gather(1, columns).topk(k, dim=1)
    return values, columns.gather(1, places)
