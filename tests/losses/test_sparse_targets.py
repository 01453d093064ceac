"""Draws and largest probabilities on vocabulary shards, against sums and a sort of the whole distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from megakd.losses.sparse_targets import Draws, Largest, draw_systematically, find_largest

over_ranks = pytest.mark.parametrize("tp_size", [1, 2, 4])
PADDED, VOCAB, BLOCK = 1152, 1027, 32


def models(seed: int, rows: int = 60, dtype: torch.dtype = torch.float64, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 16, generator=generator, dtype=dtype)
    return hidden, torch.randn(PADDED, 16, generator=generator, dtype=dtype) * (scale / 4)


def offsets(rows: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(3).random(rows))


def distribution(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    return torch.softmax((hidden.double() @ head.double().t())[:, :VOCAB] / temperature, dim=1)


def on_rank(function, hidden, head, *args, **settings):
    mine = head.chunk(dist.get_world_size())[dist.get_rank()].clone()
    return function(hidden, mine, *args, vocab_size=VOCAB, tp_group=dist.group.WORLD, chunk_mib=1, **settings)


def draws_on_rank(hidden: Tensor, head: Tensor, at: Tensor, num_samples: int, temperature: float) -> Draws:
    return on_rank(draw_systematically, hidden, head, at, num_samples=num_samples, temperature=temperature)


def largest_on_rank(hidden: Tensor, head: Tensor, k: int, temperature: float, *tail: Tensor | int) -> Largest:
    settings = dict(zip(("tail_offsets", "tail_samples"), tail, strict=False))
    return on_rank(find_largest, hidden, head, k=k, temperature=temperature, **settings)


def draw_one_by_one(p: Tensor, at: Tensor, num_samples: int) -> Tensor:
    """Draws of one row after another, point after point."""
    blocks = torch.nn.functional.pad(p, (0, -p.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    rows = []
    for row, offset in zip(blocks, at.tolist(), strict=True):
        ends = row.sum(1).cumsum(0)
        points = [(step + offset) / num_samples * float(ends[-1]) for step in range(num_samples)]
        hit = [int(torch.searchsorted(ends, point, right=True)) for point in points]
        ids = []
        for block in sorted(set(hit)):
            second = (offset * 2**26 + block * 0.6180339887498949) % 1
            inner = row[block].cumsum(0)
            for step in range(hit.count(block)):
                share = (step + second) / hit.count(block) * float(inner[-1])
                ids.append(block * BLOCK + int(torch.searchsorted(inner, share, right=True)))
        rows.append(torch.tensor(ids))
    return torch.stack(rows).long()


@over_ranks
@pytest.mark.parametrize(("num_samples", "temperature"), [(1, 1.0), (32, 1.0), (50, 2.0), (700, 0.5)])
def test_draws_are_equally_spaced_points_through_blocks_and_in_them(run_ranks, tp_size, num_samples, temperature):
    hidden, head = models(1)
    at = offsets(len(hidden))
    found = run_ranks(tp_size, draws_on_rank, hidden, head, at, num_samples, temperature)
    p = distribution(hidden, head, temperature)
    expected = draw_one_by_one(p, at, num_samples)
    for draws in found:
        assert torch.equal(draws.ids, expected)
        torch.testing.assert_close(draws.entropy, -torch.xlogy(p, p).sum(1), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_equal_logits_give_equal_draws_in_float32(run_ranks, tp_size):
    hidden, head = models(2, rows=200, dtype=torch.float32)
    # Products of few exact digits, so that cutting the head cannot change a logit.
    hidden, head = (hidden * 16).round() / 16, (head * 16).round() / 16
    at = offsets(len(hidden))
    whole = draw_systematically(hidden, head, at, num_samples=32, vocab_size=VOCAB)
    for draws in run_ranks(tp_size, draws_on_rank, hidden, head, at, 32, 1.0):
        assert torch.equal(draws.ids, whole.ids)


def test_an_id_is_drawn_as_often_as_its_probability_says():
    hidden, head = models(4, rows=1)
    p = distribution(hidden, head, 1.0)[0]
    steps, num_samples = 40_000, 8
    at = torch.from_numpy(np.random.default_rng(1).random(steps))
    draws = draw_systematically(hidden.expand(steps, -1), head, at, num_samples=num_samples, vocab_size=VOCAB)
    counts = torch.zeros(steps, PADDED).scatter_add_(1, draws.ids, torch.ones(draws.ids.shape))
    of_blocks, masses = (
        x.unflatten(-1, (-1, BLOCK)).sum(-1) for x in (counts, num_samples * pad(p, (0, PADDED - VOCAB)))
    )
    assert (of_blocks >= masses.floor()).all() and (of_blocks <= masses.ceil()).all()
    expected = steps * num_samples * p
    assert ((counts.double().sum(0)[:VOCAB] - expected).abs() <= 4.5 * (expected + 1).sqrt()).all()
    squares = (counts.double().sum(0)[:VOCAB] - expected).square() / expected
    assert squares.mean() < 1.1  # as far as independent draws would be, at most


@over_ranks
@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (3, 1.0), (32, 2.0), (600, 0.5), (VOCAB, 1.0)])
def test_the_largest_and_their_mass(run_ranks, tp_size, k, temperature):
    hidden, head = models(5)
    p = distribution(hidden, head, temperature)
    values, ids = p.topk(k, dim=1)
    for largest in run_ranks(tp_size, largest_on_rank, hidden, head, k, temperature):
        assert torch.equal(largest.ids.sort(1).values, ids.sort(1).values)
        torch.testing.assert_close(largest.log_probabilities.exp(), values, atol=0, rtol=1e-12)
        torch.testing.assert_close(largest.log_probabilities.exp(), p.gather(1, largest.ids), atol=0, rtol=1e-12)
        if k == VOCAB:
            assert (largest.log_odds == torch.inf).all()
        else:
            left = p.scatter(1, ids, 0.0).sum(1)
            torch.testing.assert_close(largest.log_odds, (values.sum(1) / left).log(), atol=1e-9, rtol=1e-9)


def test_what_is_left_is_exact_where_it_is_small():
    # One id has all but what fp64 cannot tell from nothing beside 1.
    logits = torch.zeros(1, VOCAB, dtype=torch.float64)
    logits[0, 7] = 60.0
    largest = find_largest(torch.eye(1, dtype=torch.float64), logits.t().contiguous(), k=1, vocab_size=VOCAB)
    assert largest.ids.item() == 7
    assert largest.log_odds.item() == pytest.approx(60.0 - np.log(VOCAB - 1), rel=1e-12)


@over_ranks
@pytest.mark.parametrize(("k", "tail_samples", "temperature"), [(1, 1, 1.0), (32, 3, 2.0), (600, 40, 0.5), (3, 0, 1.0)])
def test_draws_from_what_is_left(run_ranks, tp_size, k, tail_samples, temperature):
    hidden, head = models(9)
    at = offsets(len(hidden))
    p = distribution(hidden, head, temperature)
    left = p.scatter(1, p.topk(k, dim=1).indices, 0.0)
    for largest in run_ranks(tp_size, largest_on_rank, hidden, head, k, temperature, at, tail_samples):
        assert torch.equal(largest.tail_ids, draw_one_by_one(left, at, tail_samples))
        torch.testing.assert_close(largest.entropy, -torch.xlogy(p, p).sum(1), atol=1e-12, rtol=1e-12)


def test_nothing_left_to_draw_from():
    head = torch.zeros(PADDED, 1)
    head[5] = 1.0
    settings = {"tail_offsets": offsets(1), "tail_samples": 2}
    largest = find_largest(torch.tensor([[1e4]]), head, k=1, vocab_size=VOCAB, **settings)
    assert largest.ids.item() == 5 and largest.log_odds.item() == torch.inf
    assert largest.tail_ids.tolist() == [[0, 0]] and largest.entropy.item() == 0


def test_columns_that_do_not_exist_are_never_found(run_ranks):
    hidden, head = models(6)
    head[VOCAB:] = 100.0 * hidden.sum(0)  # logits that would drown all others
    for draws in run_ranks(4, draws_on_rank, hidden, head, offsets(len(hidden)), 32, 1.0):
        assert draws.ids.max() < VOCAB
    for largest in run_ranks(4, largest_on_rank, hidden, head, 32, 1.0):
        assert largest.ids.max() < VOCAB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(dtype):
    head = torch.zeros(PADDED, 1, dtype=dtype)
    head[5] = 1.0
    hidden = torch.tensor([[1e4], [-1e4], [0.0]], dtype=dtype)
    draws = draw_systematically(
        hidden, head, torch.full((3,), 1 - 2**-53, dtype=torch.float64), num_samples=4, vocab_size=VOCAB
    )
    assert draws.ids[0].tolist() == [5] * 4 and draws.entropy[0] == 0
    assert 5 not in draws.ids[1].tolist() and draws.ids[1, -1] == VOCAB - 1
    assert draws.entropy[1].item() == pytest.approx(np.log(VOCAB - 1), rel=1e-6)
    assert draws.entropy[2].item() == pytest.approx(np.log(VOCAB), rel=1e-6)


def test_no_rows():
    hidden, head = models(7, rows=0)
    draws = draw_systematically(hidden, head, offsets(0), num_samples=4, vocab_size=VOCAB)
    assert draws.ids.shape == (0, 4) and draws.entropy.shape == (0,)
    assert find_largest(hidden, head, k=4, vocab_size=VOCAB).ids.shape == (0, 4)


def refused_on_rank() -> str:
    with pytest.raises(ValueError) as raised:
        hidden, head = models(8)
        on_rank(draw_systematically, hidden, head[:1040], offsets(60), num_samples=1)
    return str(raised.value)


def test_blocks_lie_on_one_rank(run_ranks):
    assert run_ranks(4, refused_on_rank) == ["260 rows of the head on a rank; they must be a multiple of 32."] * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": VOCAB + 1}, "at most"),
        ({"k": 1, "temperature": 0}, "> 0"),
        ({"k": 1, "tail_samples": 2}, "need tail_offsets"),
        ({"k": VOCAB, "tail_samples": 2, "tail_offsets": offsets(60)}, "ids beside the k"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        find_largest(*models(8), vocab_size=VOCAB, **settings)
