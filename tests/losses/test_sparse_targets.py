"""Draws and largest probabilities on vocabulary shards, against sums and a sort of the whole distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megakd.losses.sparse_targets import Draws, Largest, draw_systematically, find_largest

over_ranks = pytest.mark.parametrize("tp_size", [1, 2, 4])
PADDED, VOCAB = 1040, 1027


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


def largest_on_rank(hidden: Tensor, head: Tensor, k: int, temperature: float) -> Largest:
    return on_rank(find_largest, hidden, head, k=k, temperature=temperature)


@over_ranks
@pytest.mark.parametrize(("num_samples", "temperature"), [(1, 1.0), (32, 1.0), (50, 2.0), (700, 0.5)])
def test_draws_are_points_of_the_cumulative_distribution(run_ranks, tp_size, num_samples, temperature):
    hidden, head = models(1)
    at = offsets(len(hidden))
    found = run_ranks(tp_size, draws_on_rank, hidden, head, at, num_samples, temperature)
    p = distribution(hidden, head, temperature)
    points = (torch.arange(num_samples) + at.unsqueeze(1)) / num_samples
    expected = torch.searchsorted(p.cumsum(1), points, right=True)
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
    steps, num_samples = 2000, 8
    at = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    draws = draw_systematically(hidden.expand(steps, -1), head, at, num_samples=num_samples, vocab_size=VOCAB)
    counts = torch.stack([torch.bincount(row, minlength=VOCAB) for row in draws.ids])
    assert (counts >= (num_samples * p).floor()).all() and (counts <= (num_samples * p).ceil()).all()
    # Over a grid of offsets the mean is off by half a step at most at either end.
    torch.testing.assert_close(counts.double().mean(0), num_samples * p, atol=1.01 / steps, rtol=0)


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
    # One id has all but a millionth of a millionth.
    logits = torch.zeros(1, VOCAB, dtype=torch.float64)
    logits[0, 7] = 35.0
    largest = find_largest(torch.eye(1, dtype=torch.float64), logits.t().contiguous(), k=1, vocab_size=VOCAB)
    assert largest.ids.item() == 7
    assert largest.log_odds.item() == pytest.approx(35.0 - np.log(VOCAB - 1), abs=2e-2)  # fp64 holds 1 - 1e-12 to 1e-16


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


@pytest.mark.parametrize(
    ("settings", "message"), [({"k": 0}, "k is 0"), ({"k": VOCAB + 1}, "at most"), ({"k": 1, "temperature": 0}, "> 0")]
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        find_largest(*models(8), vocab_size=VOCAB, **settings)
