"""Every token's hidden state arrives once, where it belongs, whatever the layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.parallel.bridge import Bridge
from megakd.parallel.pieces import Spread, Window, plan_pieces
from tests.parallel.sent_bytes import count_sent_bytes

WIDTH = 3


def spread(dp: int, tp: int, micro_batch_size: int, is_cut: bool, first_rank: int = 0) -> Spread:
    ranks = tuple(tuple(first_rank + d * tp + t for t in range(tp)) for d in range(dp))
    return Spread(ranks, micro_batch_size, tp if is_cut else 1)


def hidden_of(held: Spread, rank: int, samples: int, length: int, one_row: bool) -> list[torch.Tensor]:
    """What a rank holds where each token's state is its number (sample * length + position), from the definition."""
    tensors = []
    for data_rank, row in enumerate(held.ranks):
        for tensor_rank, holder in enumerate(row):
            if holder != rank:
                continue
            micro, shards = held.micro_batch_size, held.sequence_shards
            for m in range(samples // (len(held.ranks) * micro)):
                first = (m * len(held.ranks) + data_rank) * micro
                numbers = torch.arange(first * length, (first + micro) * length).view(micro, length)
                whole = numbers.reshape(-1, 1) if one_row else numbers.t()
                mine = whole.chunk(shards)[tensor_rank] if shards > 1 else whole
                tensors.append(mine.unsqueeze(2).expand(-1, -1, WIDTH).float().contiguous())
    return tensors


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_pieces_put_every_state_in_its_place(data: st.DataObject) -> None:
    sizes = st.sampled_from([1, 2, 4])
    one_row = data.draw(st.booleans())
    length = 8 * data.draw(st.integers(1, 3))
    source = spread(data.draw(sizes), data.draw(sizes), data.draw(sizes), data.draw(st.booleans()))
    target = spread(data.draw(sizes), data.draw(sizes), data.draw(sizes), True, first_rank=data.draw(st.integers(0, 5)))
    samples = 16 * data.draw(st.integers(1, 2))
    ranks = {rank for held in (source, target) for row in held.ranks for rank in row}
    there = {rank: hidden_of(source, rank, samples, length, one_row) for rank in ranks}
    expected = {rank: hidden_of(target, rank, samples, length, one_row) for rank in ranks}
    arrived = {rank: [torch.full_like(tensor, -1) for tensor in tensors] for rank, tensors in expected.items()}
    moved = 0
    for piece in plan_pieces(source, target, Window(samples, length, one_row)):
        a, b = piece.source, piece.target
        state = there[a.rank][a.microbatch][a.start : a.start + piece.length, a.column]
        arrived[b.rank][b.microbatch][b.start : b.start + piece.length, b.column] = state
        moved += piece.length
    assert moved == samples * length  # each once
    for rank in ranks:
        for got, wanted in zip(arrived[rank], expected[rank], strict=True):
            assert torch.equal(got, wanted)


def carried(source: Spread, target: Spread, samples: int, length: int, one_row: bool) -> tuple[bool, float]:
    """Whether this rank gets what it should, and bytes it sent."""
    import torch.distributed as dist

    rank = dist.get_rank()
    bridge = Bridge(source, target, rank, width=WIDTH, dtype=torch.float32, device=torch.device("cpu"))
    hidden = hidden_of(source, rank, samples, length, one_row)
    with count_sent_bytes() as sent:
        got = bridge.carry(hidden, Window(samples, length, one_row), dist.group.WORLD)
    wanted = hidden_of(target, rank, samples, length, one_row)
    right = len(got) == len(wanted) and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    return right, sent["messages"] + sent["collectives"]


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        (spread(1, 4, 2, True), spread(1, 2, 2, True, first_rank=2)),
        (spread(4, 1, 1, False), spread(1, 2, 4, True, first_rank=2)),
        (spread(2, 2, 2, False), spread(4, 1, 1, True)),
        (spread(1, 1, 2, False, first_rank=3), spread(1, 2, 2, True)),
    ],
)
def test_ranks_send_each_state_at_most_once(run_ranks: Any, source: Spread, target: Spread, one_row: bool) -> None:
    samples, length = 16, 16
    results = run_ranks(4, carried, source, target, samples, length, one_row)
    assert all(right for right, _ in results)
    # Less where a rank has already what it needs.
    assert sum(sent for _, sent in results) <= samples * length * WIDTH * 4
