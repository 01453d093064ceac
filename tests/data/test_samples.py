"""Samples are cut once in file order; documents, blends and splits, token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megakd.common.errors import UserError
from megakd.data.indexed import TokenStream
from megakd.data.samples import Blend, TokenSamples, split_items
from tests.data.example_files import write_pair

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
        sample = samples.sample(i)
        assert sample.tokens.tolist() == tokens[i * length : i * length + length]
        assert sample.labels.tolist() == tokens[i * length + 1 : i * length + length + 1]
        assert sample.loss_mask.tolist() == [1] * length and sample.position_ids.tolist() == list(range(length))
        assert sample.segments == (length,)


@pytest.mark.parametrize("num_tokens", [0, 1, 8])
def test_too_short_a_corpus(memory_stream: Streams, num_tokens: int) -> None:
    message = rf"memory holds {num_tokens} tokens; one sample needs data.sequence_length \+ 1 = 9"
    with pytest.raises(UserError, match=message):
        TokenSamples(memory_stream(num_tokens), 8)


# Documents of 3, 5 and 2 tokens and one of 6, 9 ends each: samples of 5 begin at tokens 0, 5 and 10.
DOCUMENTS = [[1, 2, 9], [3, 4, 5, 6, 9], [7, 9], [1, 2, 3, 4, 5, 9]]


@pytest.mark.parametrize(
    ("settings", "sample", "mask", "positions", "segments"),
    [
        # tokens 1 2 9 3 4, labels 2 9 3 4 5
        ({"eod_mask_loss": True}, 0, [1, 1, 0, 1, 1], [0, 1, 2, 3, 4], (5,)),
        ({"reset_position_ids": True}, 0, [1] * 5, [0, 1, 2, 0, 1], (5,)),
        ({"reset_attention_mask": True}, 0, [1] * 5, [0, 1, 2, 3, 4], (3, 2)),
        # tokens 5 6 9 7 9, labels 6 9 7 9 1: the first label of the next sample's document is not learnt either
        ({"eod_mask_loss": True}, 1, [1, 1, 0, 1, 0], [0, 1, 2, 3, 4], (5,)),
        ({"reset_position_ids": True, "reset_attention_mask": True}, 1, [1] * 5, [0, 1, 2, 0, 1], (3, 2)),
        # tokens 1 2 3 4 5, labels 2 3 4 5 9: one document
        (
            {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True},
            2, [1] * 5, [0, 1, 2, 3, 4], (5,),
        ),
    ],
)  # fmt: skip
def test_documents_in_a_sample(
    tmp_path: Path, settings: dict[str, bool], sample: int, mask: list[int], positions: list[int], segments: Any
) -> None:
    write_pair(tmp_path / "d", DOCUMENTS)
    read = TokenSamples(TokenStream(tmp_path / "d"), 5, **settings).sample(sample)
    assert read.loss_mask.tolist() == mask
    assert read.position_ids.tolist() == positions
    assert read.segments == segments


@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=12).filter(lambda x: sum(x) > 0), data=st.data())
def test_documents_of_several_sequences(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], data: st.DataObject
) -> None:
    """Megatron's own files may hold documents of several sequences, or of none."""
    prefix = tmp_path_factory.mktemp("d") / "d"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    starts, begin, at, i = [], 0, 0, 0
    while i < len(lengths):
        parts = lengths[i : i + data.draw(st.integers(1, 3))]
        builder.add_document(np.arange(at, at + sum(parts), dtype=np.int32), parts)
        starts.append(at)
        begin, at, i = at, at + sum(parts), i + len(parts)
    builder.finalize(f"{prefix}.idx")
    stream = TokenStream(prefix)
    assert begin <= stream.num_tokens == sum(lengths)
    assert stream.document_lengths().tolist() == np.diff([*starts, at]).tolist()
    for first in range(stream.num_tokens + 1):
        for last in range(first, stream.num_tokens + 1):
            assert stream.document_starts(first, last).tolist() == sorted({s for s in starts if first <= s < last})


def test_a_blend_numbers_its_parts_one_after_another(memory_stream: Streams) -> None:
    parts = [TokenSamples(memory_stream(n * 4 + 1), 4) for n in (3, 1, 2)]
    blend = Blend(parts)
    assert blend.num_samples == 6 and not blend.has_segments
    found = [blend.sample(i).tokens[0] for i in range(6)]
    assert found == [1000, 1004, 1008, 1000, 1000, 1004]
    assert [blend.ids(n, range(0, 1)) for n in range(3)] == [range(0, 1), range(3, 4), range(4, 5)]
    assert Blend([*parts, TokenSamples(memory_stream(9), 4, reset_attention_mask=True)]).has_segments


@given(count=st.integers(3, 10_000), valid=st.floats(0, 0.99), test=st.floats(0, 0.99))
def test_split_holds_out_the_end(count: int, valid: float, test: float) -> None:
    if valid + test >= 1:
        return
    split = split_items(count, valid, test)
    assert [*split.train, *split.valid, *split.test] == list(range(count))
    assert len(split.train) >= 1
    for part, fraction in ((split.valid, valid), (split.test, test)):
        assert (len(part) == 0) == (fraction == 0)
        if fraction and count * fraction >= 1 and count * (1 - valid - test) >= 1:
            assert abs(len(part) - count * fraction) <= 1


def test_split_of_too_few() -> None:
    with pytest.raises(UserError, match="data.valid_fraction is 0.1, but the data is 1 sample; a split needs 2"):
        split_items(1, 0.1)
    with pytest.raises(UserError, match="data.valid_fraction is 0.1 and data.test_fraction is 0.2, .* 2 samples; a sp"):
        split_items(2, 0.1, 0.2)


@given(
    lengths=st.lists(st.integers(1, 7), min_size=2, max_size=10),
    length=st.integers(1, 9),
    resets=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_documents_are_told_apart_as_megatron_core_does(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int, resets: tuple[bool, bool, bool]
) -> None:
    """Where every document ends with the one end-of-document token, and no other token is that one."""
    documents = [[*range(1, size), 99] for size in lengths]
    if sum(lengths) < length + 1:
        return
    prefix = tmp_path_factory.mktemp("d") / "d"
    write_pair(prefix, documents)
    reset_position_ids, reset_attention_mask, eod_mask_loss = resets
    samples = TokenSamples(
        TokenStream(prefix), length, reset_position_ids=reset_position_ids, reset_attention_mask=reset_attention_mask,
        eod_mask_loss=eod_mask_loss,
    )  # fmt: skip
    for number in range(samples.num_samples):
        sample = samples.sample(number)
        masked, loss_mask, position_ids = _get_ltor_masks_and_position_ids(
            torch.from_numpy(sample.tokens), 99, reset_position_ids, reset_attention_mask, eod_mask_loss, True
        )
        segment = np.repeat(np.arange(len(sample.segments)), sample.segments)
        attends = (segment[:, None] == segment) & np.tri(length, dtype=bool)
        assert np.array_equal(attends, ~masked[0].numpy())
        assert sample.position_ids.tolist() == position_ids.tolist()
        assert sample.loss_mask.tolist() == loss_mask.tolist()
