"""Samples are cut once in file order; the order of each epoch is a permutation fixed by seed and epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakd.common.errors import UserError
from megakd.data.samples import SampleOrder, TokenSamples, split_samples

Streams = Callable[[int], Any]


@given(num_tokens=st.integers(2, 60), length=st.integers(1, 20))
def test_samples_tile_the_stream(memory_stream: Streams, num_tokens: int, length: int) -> None:
    stream = memory_stream(num_tokens)
    tokens = stream.slice(0, num_tokens).tolist()
    if num_tokens < length + 1:
        with pytest.raises(UserError):
            TokenSamples(stream, length)
        return
    samples = TokenSamples(stream, length)
    assert samples.num_samples == len([i for i in range(num_tokens) if (i + 1) * length < num_tokens])
    for i in range(samples.num_samples):
        assert samples.tokens(i).tolist() == tokens[i * length : i * length + length + 1]


def test_a_view_keeps_the_ids(memory_stream: Streams) -> None:
    stream = memory_stream(41)
    whole, view = TokenSamples(stream, 4), TokenSamples(stream, 4, first=7, last=9)
    assert (whole.num_samples, view.num_samples) == (10, 2)
    assert view.tokens(8).tolist() == whole.tokens(8).tolist()
    with pytest.raises(AssertionError):
        view.tokens(9)


@pytest.mark.parametrize("num_tokens", [0, 1, 8])
def test_too_short_a_corpus(memory_stream: Streams, num_tokens: int) -> None:
    message = rf"memory holds {num_tokens} tokens; one sample needs data.sequence_length \+ 1 = 9"
    with pytest.raises(UserError, match=message):
        TokenSamples(memory_stream(num_tokens), 8)


@given(num_samples=st.integers(2, 10_000), fraction=st.floats(0.0001, 0.9999))
def test_split_holds_out_the_tail(num_samples: int, fraction: float) -> None:
    train, valid = split_samples(num_samples, fraction)
    assert [*train, *valid] == list(range(num_samples))
    assert len(train) >= 1 and len(valid) >= 1
    if 1 <= num_samples * fraction <= num_samples - 1:
        assert abs(len(valid) - num_samples * fraction) <= 0.5


def test_split_of_one_sample() -> None:
    with pytest.raises(UserError, match="data.valid_fraction is 0.1, but the data is 1 sample; a split needs 2"):
        split_samples(1, 0.1)


@given(num_samples=st.integers(1, 40), seed=st.integers(0, 2**63), epoch=st.integers(0, 5))
def test_every_epoch_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    ids = SampleOrder(num_samples, seed).sample_ids(epoch * num_samples, num_samples)
    assert ids.dtype == np.int64
    assert sorted(ids.tolist()) == list(range(num_samples))


@given(num_samples=st.integers(1, 12), start=st.integers(0, 60), count=st.integers(0, 50))
def test_any_window_is_the_same_sequence(num_samples: int, start: int, count: int) -> None:
    order = SampleOrder(num_samples, seed=3)
    one_by_one = [int(SampleOrder(num_samples, seed=3).sample_ids(p, 1)[0]) for p in range(start, start + count)]
    assert order.sample_ids(start, count).tolist() == one_by_one
    assert order.sample_ids(start, count).tolist() == one_by_one, "asking again changes nothing"


def test_ids_are_fixed_for_good() -> None:
    """A resumed run on another numpy must see the same order: these ids must never change."""
    assert SampleOrder(8, seed=1234).sample_ids(0, 16).tolist() == [1, 6, 2, 0, 3, 5, 7, 4, 3, 6, 7, 0, 5, 4, 1, 2]
    assert SampleOrder(8, seed=1235).sample_ids(0, 8).tolist() == [0, 2, 3, 5, 4, 7, 6, 1]


def test_only_two_epochs_are_kept() -> None:
    order = SampleOrder(10, seed=1)
    for step in range(30):
        order.sample_ids(step * 4, 4)
        assert len(order._epochs) <= 2
