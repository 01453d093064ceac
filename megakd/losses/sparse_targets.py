"""What a sparse signal keeps of a teacher: draws from its distribution, or its k largest probabilities.

Logits exist a chunk of rows at a time. Masses are summed in fp64, by blocks of columns.

Systematic sampling is done twice: equally spaced points through the blocks' masses say how many draws each block has,
and as many equally spaced points through a block say which. Points through all ids in one go have as many borders to
fall over as there are ids, each as far off as all sums before it: of logits that differ in their last digits, as those
of two layouts do, many times more draws came out otherwise.
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
from megakd.losses.shards import SENTINEL, VocabularyShard, build_shard, compute_dtype

BLOCK_COLUMNS = 32  # as few as to make a search in a block cheap, as many as to make blocks few
_STEP = 0.6180339887498949  # golden ratio: offsets of neighbouring blocks are spread evenly
_LOW_BITS = 2.0**26  # of an offset: below what decides between blocks
SEARCHED_COLUMNS = 1 << 20  # columns looked at together


class Draws(NamedTuple):
    """ids: [n, N] int64, ascending in a row, with repeats; entropy: [n] fp64, of the whole distribution, in nats."""

    ids: Tensor
    entropy: Tensor


class Largest(NamedTuple):
    """ids: [n, k] int64 and log_probabilities [n, k] fp64, largest first; log_odds: [n] fp64.

    The log-odds ln(P / (1 - P)) of the ids' mass P keep what is left beside them exact; infinite where nothing is.
    tail_ids: [n, m] int64, ascending in a row, with repeats: draws from the other ids; 0 where nothing is left.
    entropy: [n] fp64, of the whole distribution, in nats.
    """

    ids: Tensor
    log_probabilities: Tensor
    log_odds: Tensor
    tail_ids: Tensor
    entropy: Tensor


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
    """N systematic draws from each row's distribution, softmax(hidden head^T / temperature).

    An id is drawn exactly N p times on average over uniform offsets, and a block of BLOCK_COLUMNS ids N P times rounded
    down or up. Equal logits and offsets give equal draws whatever the number of tensor ranks, but for points that the
    rounding of fp64 moves over a border.

    hidden: [n, h] on every tensor rank; head: [v/tp, h], over several ranks v/tp a multiple of BLOCK_COLUMNS.
    offsets: [n] fp64 in [0, 1), of the first point in steps of 1/N.

    Returns the same on every tensor rank. Raises ValueError for a size or a temperature that cannot be.
    """
    _check(num_samples, "num_samples", temperature)
    shard = _build_shard(head, vocab_size, tp_group)
    count = hidden.shape[0]
    ids = torch.zeros((count, num_samples), dtype=torch.int64, device=hidden.device)
    entropy = torch.empty(count, dtype=torch.float64, device=hidden.device)
    for part, x in _chunks(hidden, head, shard, temperature, chunk_mib):
        blocks, dot = _masses(x)
        totals, dot = _gather_masses(shard, blocks, dot)
        total = totals.sum(0)
        entropy[part] = (total.log() - dot / total).clamp_(min=0.0)
        ids[part] = _draw(x, blocks, totals, offsets[part], num_samples, shard)
    return Draws(shard.sum_statistics(ids), entropy)


@torch.no_grad()
def find_largest(
    hidden: Tensor,
    head: Tensor,
    *,
    k: int,
    vocab_size: int,
    temperature: float = 1.0,
    tail_offsets: Tensor | None = None,
    tail_samples: int = 0,
    tp_group: ProcessGroup | None = None,
    chunk_mib: int | None = None,
) -> Largest:
    """The k largest of softmax(hidden head^T / temperature), and `tail_samples` systematic draws from the others.

    Arguments as draw_systematically has them; tail_offsets is its offsets. Returns the same on every tensor rank.
    Raises ValueError for a size or a temperature that cannot be.
    """
    _check(k, "k", temperature)
    if k > vocab_size:
        raise ValueError(f"k is {k}; it must be at most vocab_size, {vocab_size}.")
    if tail_samples and (tail_offsets is None or k == vocab_size):
        raise ValueError(f"tail_samples is {tail_samples}; draws need tail_offsets, and ids beside the k.")
    shard = _build_shard(head, vocab_size, tp_group)
    count, device = hidden.shape[0], hidden.device
    ids = torch.empty((count, k), dtype=torch.int64, device=device)
    log_probabilities = torch.empty((count, k), dtype=torch.float64, device=device)
    log_odds, entropy = (torch.empty(count, dtype=torch.float64, device=device) for _ in range(2))
    tail_ids = torch.zeros((count, tail_samples), dtype=torch.int64, device=device)
    for part, x in _chunks(hidden, head, shard, temperature, chunk_mib):
        values, columns = _top_columns(x, min(k, shard.width))
        if shard.tp_size > 1:
            values = torch.cat(shard.gather_statistics(values).unbind(), dim=1)
            columns = torch.cat(shard.gather_statistics(columns + shard.first_id).unbind(), dim=1)
            values, places = values.topk(k, dim=1)
            columns = columns.gather(1, places)
        values = values.double()
        _mask_out_(x, columns - shard.first_id)
        blocks, dot = _masses(x)
        totals, dot = _gather_masses(shard, blocks, dot)
        powers, left = values.exp(), totals.sum(0)
        kept = powers.sum(1)
        log_total = (kept + left).log()
        ids[part], log_probabilities[part] = columns, values - log_total.unsqueeze(1)
        log_odds[part] = kept.log() - left.log()
        entropy[part] = (log_total - (dot + (powers * values).sum(1)) / (kept + left)).clamp_(min=0.0)
        if tail_offsets is not None and tail_samples:
            tail_ids[part] = _draw(x, blocks, totals, tail_offsets[part], tail_samples, shard)
    return Largest(ids, log_probabilities, log_odds, shard.sum_statistics(tail_ids), entropy)


def _check(count: int, name: str, temperature: float) -> None:
    if count < 1:
        raise ValueError(f"{name} is {count}; it must be at least 1.")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be > 0.")


def _build_shard(head: Tensor, vocab_size: int, group: ProcessGroup | None) -> VocabularyShard:
    shard = build_shard(head.shape[0], vocab_size, group)
    if shard.tp_size > 1 and shard.width % BLOCK_COLUMNS:
        raise ValueError(f"{shard.width} rows of the head on a rank; they must be a multiple of {BLOCK_COLUMNS}.")
    return shard


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


def _mask_out_(x: Tensor, columns: Tensor) -> None:
    """Leave no mass in these columns [c, k], of which some may be other shards'."""
    row, slot = ((columns >= 0) & (columns < x.shape[1])).nonzero(as_tuple=True)
    x[row, columns[row, slot]] = SENTINEL


def _gather_masses(shard: VocabularyShard, blocks: Tensor, dot: Tensor) -> tuple[Tensor, Tensor]:
    """The mass of each shard [tp, c], and `dot` [c] over all."""
    gathered = shard.gather_statistics(torch.stack([blocks.sum(1), dot], dim=1))  # [tp, c, 2]
    return gathered[:, :, 0], gathered[:, :, 1].sum(0)


def _masses(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of e^x [c, blocks] in fp64, and sum e^x x [c] over this shard."""
    rows, width = x.shape
    count = -(-width // BLOCK_COLUMNS)
    blocks = torch.empty((rows, count), dtype=torch.float64, device=x.device)
    dot = torch.empty(rows, dtype=torch.float64, device=x.device)
    step = block_rows(rows, width, 4, x.device, x.element_size())
    powers = torch.empty((min(step, rows), width), dtype=x.dtype, device=x.device)
    exact = torch.zeros((min(step, rows), count * BLOCK_COLUMNS), dtype=torch.float64, device=x.device)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        block, size = x[part], part.stop - start
        e = torch.exp(block, out=powers[:size])
        wide = exact[:size]
        wide[:, :width].copy_(e)
        torch.sum(wide.view(size, count, BLOCK_COLUMNS), 2, out=blocks[part])
        dot[part] = torch.linalg.vecdot(e, block).double()
    return blocks, dot


def _draw(x: Tensor, blocks: Tensor, totals: Tensor, offsets: Tensor, count: int, shard: VocabularyShard) -> Tensor:
    """Draws [c, count] by mass e^x, in ascending order; 0 where they are another shard's, or there is no mass.

    blocks: [c, blocks], the masses; totals: [tp, c], their sums on every shard.
    """
    sums, ends = blocks.cumsum(1), totals.cumsum(0)
    total, end = ends[-1].unsqueeze(1), ends[shard.tp_rank].unsqueeze(1)
    begin = ends[shard.tp_rank - 1].unsqueeze(1) if shard.tp_rank else torch.zeros_like(end)
    points = (torch.arange(count, dtype=torch.float64, device=x.device) + offsets.unsqueeze(1)) * (total / count)
    points = torch.minimum(points, torch.nextafter(total, torch.zeros_like(total)))
    mine = (points >= begin) & (points < end)
    # What the sum of all shards rounds up beyond this one's own falls to the last block that has mass.
    inside = torch.minimum(points - begin, torch.nextafter(sums[:, -1:], torch.zeros_like(end))).clamp_(min=0.0)
    block = torch.searchsorted(sums, inside, right=True).clamp_(max=blocks.shape[1] - 1)
    block = torch.where(mine, block, torch.where(points < begin, -1, blocks.shape[1]))
    first = torch.searchsorted(block, block)
    drawn = torch.searchsorted(block, block, right=True) - first
    offset = (offsets.unsqueeze(1) * _LOW_BITS + (block + shard.first_id // BLOCK_COLUMNS) * _STEP).frac()
    share = (torch.arange(count, device=x.device) - first + offset) / drawn
    columns = _search(x, block.clamp(0, blocks.shape[1] - 1), share)
    return torch.where(mine, columns + shard.first_id, 0)


def _search(x: Tensor, block: Tensor, share: Tensor) -> Tensor:
    """The columns [c, N] where the cumulative sum of e^x through a block passes this share of its mass.

    A column of no mass is not found in a block that has some.
    """
    found = torch.empty(block.shape, dtype=torch.int64, device=x.device)
    step = max(1, SEARCHED_COLUMNS // (block.shape[1] * BLOCK_COLUMNS))
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        found[part] = _search_rows(x[part], block[part], share[part])
    return found


def _search_rows(x: Tensor, block: Tensor, share: Tensor) -> Tensor:
    width = x.shape[1]
    places = torch.arange(BLOCK_COLUMNS, device=x.device)
    columns = block.unsqueeze(2) * BLOCK_COLUMNS + places  # [c, N, columns]
    mass = x.gather(1, columns.clamp(max=width - 1).flatten(1)).view(columns.shape).exp().double()
    sums = mass.masked_fill_(columns >= width, 0.0).cumsum(2)
    passed = sums <= share.unsqueeze(2) * sums[:, :, -1:]
    last = torch.where(mass > 0, places, 0).amax(2)
    return block * BLOCK_COLUMNS + torch.minimum(passed.sum(2), last)


def _top_columns(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns, [c, k] each.

    They are in the k blocks with the largest maxima: where those are few, only they are searched.
    """
    rows, width = x.shape
    count = width // BLOCK_COLUMNS
    if count <= 2 * k:
        values, columns = x.topk(k, dim=1)
        return values, columns
    whole = count * BLOCK_COLUMNS
    maxima = x[:, :whole].unflatten(1, (count, BLOCK_COLUMNS)).amax(2)
    block = maxima.topk(k, dim=1).indices
    columns = (block.unsqueeze(2) * BLOCK_COLUMNS + torch.arange(BLOCK_COLUMNS, device=x.device)).flatten(1)
    rest = torch.arange(whole, width, device=x.device).expand(rows, -1)
    columns = torch.cat([columns, rest], dim=1)
    values, places = x.gather(1, columns).topk(k, dim=1)
    return values, columns.gather(1, places)
