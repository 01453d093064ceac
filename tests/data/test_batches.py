"""The global batch does not depend on the layout; evaluation counts every held-out token once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.common.errors import UserError
from megakd.data.batches import EvaluationBatches, TrainBatches, collate, count_microbatches
from megakd.data.order import SampleOrder, Share
from megakd.data.samples import TokenSamples

Streams = Callable[[int], Any]
LENGTH = 4


def order_of(num_samples: int, seed: int = 5, first: int = 0) -> SampleOrder:
    return SampleOrder([Share(range(first, first + num_samples), num_samples)], seed)


def train_batches(samples: TokenSamples, mbs: int, gbs: int, rank: int, ranks: int, seed: int = 5) -> TrainBatches:
    return TrainBatches(
        samples,
        order_of(samples.num_samples, seed),
        micro_batch_size=mbs,
        global_batch_size=gbs,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
    )


def same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x) for x, y in zip(a, b, strict=True)
    )


def test_collate(memory_stream: Streams) -> None:
    samples = TokenSamples(memory_stream(21), LENGTH)  # tokens count up from 1000
    batch = collate(samples, [3, 0])
    assert batch["tokens"].tolist() == [[1012, 1013, 1014, 1015], [1000, 1001, 1002, 1003]]
    assert batch["labels"].tolist() == [[1013, 1014, 1015, 1016], [1001, 1002, 1003, 1004]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]] * 2
    assert batch["loss_mask"].tolist() == [[1.0] * 4] * 2
    assert batch["sample_ids"].tolist() == [3, 0]
    dtypes = {name: tensor.dtype for name, tensor in batch.items()}
    assert dtypes.pop("loss_mask") == torch.float32
    assert set(dtypes) == {"tokens", "labels", "position_ids", "sample_ids"} and set(dtypes.values()) == {torch.int64}
    assert all(tensor.is_contiguous() for tensor in batch.values())


@settings(max_examples=40)
@given(
    mbs=st.integers(1, 3),
    ranks=st.integers(1, 4),
    num_microbatches=st.integers(1, 3),
    num_samples=st.integers(1, 30),
    first=st.integers(0, 5),
    step=st.integers(0, 6),
)
def test_global_batch_is_the_same_in_every_layout(
    memory_stream: Streams, mbs: int, ranks: int, num_microbatches: int, num_samples: int, first: int, step: int
) -> None:
    gbs = mbs * ranks * num_microbatches
    samples = TokenSamples(memory_stream((first + num_samples) * LENGTH + 1), LENGTH)
    order = order_of(num_samples, first=first)
    expected = order.sample_ids(step * gbs, gbs).tolist()
    assert set(expected) <= set(range(first, first + num_samples))
    seen: list[int] = []
    for rank in range(ranks):
        batches = TrainBatches(
            samples, order, micro_batch_size=mbs, global_batch_size=gbs, data_parallel_rank=rank,
            data_parallel_size=ranks,
        )  # fmt: skip
        microbatches = batches.microbatches(step)
        batches.close()
        assert len(microbatches) == batches.num_microbatches == num_microbatches
        for batch in microbatches:
            assert batch["tokens"].shape == (mbs, LENGTH)
            assert batch["tokens"][:, 0].tolist() == (1000 + batch["sample_ids"] * LENGTH).tolist()
            seen += batch["sample_ids"].tolist()
    assert sorted(seen) == sorted(expected)


@settings(max_examples=20)
@given(step=st.integers(0, 12), num_samples=st.integers(1, 20))
def test_resuming_equals_continuing(memory_stream: Streams, step: int, num_samples: int) -> None:
    samples = TokenSamples(memory_stream(num_samples * LENGTH + 1), LENGTH)
    through, resumed = (train_batches(samples, 1, 4, 1, 2) for _ in range(2))
    for earlier in range(step):
        through.microbatches(earlier)
    for later in range(step, step + 3):
        assert same(through.microbatches(later), resumed.microbatches(later))
    through.close()
    resumed.close()


def test_steps_in_any_order_and_after_close(memory_stream: Streams) -> None:
    samples = TokenSamples(memory_stream(41), LENGTH)
    batches = train_batches(samples, 1, 2, 0, 1)
    at = {step: batches.microbatches(step) for step in range(6)}
    for step in (3, 3, 0, 5, 1):
        assert same(batches.microbatches(step), at[step])
    batches.close()
    batches.close()
    assert same(batches.microbatches(2), at[2])
    batches.close()


def test_the_next_step_is_read_ahead_on_a_thread(memory_stream: Streams) -> None:
    samples = TokenSamples(memory_stream(41), LENGTH)
    order = order_of(10, 1)
    asked: list[tuple[int, str]] = []
    second = threading.Event()

    class Recording(SampleOrder):
        def sample_ids(self, start: int, count: int) -> Any:
            asked.append((start, threading.current_thread().name))
            if start == 2:
                second.set()
            return order.sample_ids(start, count)

    batches = TrainBatches(
        samples,
        Recording(order.shares, 1),
        micro_batch_size=2,
        global_batch_size=2,
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    assert asked == [], "nothing is read before the first step is asked for"
    batches.microbatches(0)
    assert second.wait(timeout=30)
    batches.close()
    assert [start for start, _ in asked] == [0, 2]
    assert all(name.startswith("megakd-data") for _, name in asked)


def test_an_error_while_reading_reaches_the_caller(memory_stream: Streams) -> None:
    stream = memory_stream(41)
    samples = TokenSamples(stream, LENGTH)
    batches = train_batches(samples, 1, 2, 0, 1)

    def fail(start: int, stop: int) -> Any:
        raise OSError("the disk went away")

    stream.slice = fail
    with pytest.raises(OSError, match="the disk went away"):
        batches.microbatches(0)
    batches.close()


@pytest.mark.parametrize(
    ("gbs", "mbs", "ranks", "message"),
    [
        (10, 4, 2, r"data.global_batch_size is 10; .* = 4 x 2 = 8. Use 8 or 16, or another micro_batch_size\."),
        (3, 2, 2, r"data.global_batch_size is 3; .* = 2 x 2 = 4. Use 4, or another micro_batch_size\."),
    ],
)
def test_bad_layouts(gbs: int, mbs: int, ranks: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        count_microbatches(gbs, mbs, ranks)


def test_train_batches_checks_the_layout(memory_stream: Streams) -> None:
    with pytest.raises(UserError, match="data.global_batch_size is 5"):
        train_batches(TokenSamples(memory_stream(41), LENGTH), 2, 5, 0, 1)


@settings(max_examples=60)
@given(
    num_samples=st.integers(1, 15),
    first=st.integers(0, 4),
    mbs=st.integers(1, 4),
    ranks=st.integers(1, 4),
    max_tokens=st.one_of(st.none(), st.integers(1, 70)),
)
def test_evaluation_counts_every_token_once(
    memory_stream: Streams, num_samples: int, first: int, mbs: int, ranks: int, max_tokens: int | None
) -> None:
    samples = TokenSamples(memory_stream((first + num_samples) * LENGTH + 1), LENGTH)
    ids = np.arange(first, first + num_samples)
    labels: list[int] = []
    lengths = set()
    for rank in range(ranks):
        batches = EvaluationBatches(
            samples, ids, micro_batch_size=mbs, data_parallel_rank=rank, data_parallel_size=ranks, max_tokens=max_tokens
        )
        listed = list(batches)
        assert same(listed, list(batches)), "it can be iterated again"
        assert len(listed) == len(batches)
        lengths.add(len(listed))
        for batch in listed:
            assert {tuple(batch[name].shape) for name in ("tokens", "labels", "loss_mask")} == {(mbs, LENGTH)}
            assert batch["tokens"][:, 0].tolist() == (1000 + batch["sample_ids"] * LENGTH).tolist()
            labels += batch["labels"][batch["loss_mask"] > 0].tolist()
    counted = min(num_samples * LENGTH, max_tokens or num_samples * LENGTH)
    start = 1000 + first * LENGTH + 1
    assert len(lengths) == 1
    assert sorted(labels) == list(range(start, start + counted))
    assert batches.num_tokens == counted


@pytest.mark.parametrize("max_tokens", [None, 13])
def test_packed_evaluation_counts_the_same_labels(memory_stream: Streams, max_tokens: int | None) -> None:
    """Only the shape differs: [1, b * s]."""
    counted = []
    for resets in (False, True):
        samples = TokenSamples(memory_stream(21), LENGTH, eod_mask_loss=True, reset_attention_mask=resets)
        batches = EvaluationBatches(
            samples, np.arange(5), micro_batch_size=2, data_parallel_rank=0, data_parallel_size=1,
            max_tokens=max_tokens,
        )  # fmt: skip
        labels = [label for batch in batches for label in batch["labels"][batch["loss_mask"] > 0].tolist()]
        counted.append(labels)
    assert counted[0] == counted[1] and len(counted[0]) == (14 if max_tokens is None else 9)


def test_collate_with_segments(memory_stream: Streams) -> None:
    # Documents begin at every third token: samples 3 and 0 are tokens 12 to 15 and 0 to 3.
    batch = collate(TokenSamples(memory_stream(21), LENGTH, reset_attention_mask=True), [3, 0])
    assert batch["tokens"].tolist() == [[1012, 1013, 1014, 1015, 1000, 1001, 1002, 1003]]
    assert batch["labels"].shape == batch["loss_mask"].shape == batch["position_ids"].shape == (1, 8)
    assert batch["cu_seqlens"].tolist() == [0, 3, 4, 7, 8] and batch["cu_seqlens"].dtype == torch.int32
    assert batch["max_seqlen"].item() == 3
    assert batch["sample_ids"].tolist() == [3, 0]


def test_batches_are_plain_memory_of_their_own(memory_stream: Streams) -> None:
    samples = TokenSamples(memory_stream(41), LENGTH)
    ids = np.array([1, 2])
    batch = collate(samples, ids)
    batch["sample_ids"].zero_()
    batch["tokens"].zero_()
    assert ids.tolist() == [1, 2]
    assert batch["labels"].tolist() == [[1005, 1006, 1007, 1008], [1009, 1010, 1011, 1012]]
