"""Masks from characters, for the offsets that tokenizers give in odd cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megakd.data.offsets import OffsetTokenizer, Tokens, Turn, require_offsets, turn_mask, turn_weights
from megakd.data.tokenizer import load_tokenizer


def tokens(*spans: tuple[int, int]) -> Tokens:
    starts, ends = np.array(spans, dtype=np.int64).T
    return Tokens(np.zeros(len(spans), dtype=np.int32), starts, ends)


@pytest.mark.parametrize(
    ("spans", "turns", "mask"),
    [
        ([(0, 2), (2, 4), (4, 6)], [Turn(2, 4, True)], [0, 2, 0]),
        ([(0, 3), (3, 5), (5, 6)], [Turn(2, 4, True)], [2, 2, 0]),
        # Several tokens of one character, and one that has none.
        ([(0, 1), (1, 2), (1, 2), (2, 3)], [Turn(1, 2, True)], [0, 2, 2, 0]),
        ([(0, 1), (1, 1), (1, 2), (2, 2), (2, 3)], [Turn(1, 2, True)], [0, 2, 2, 0, 0]),
        # A token of two turns is of the later one.
        ([(0, 1), (1, 4), (4, 5)], [Turn(0, 2, False), Turn(3, 5, True)], [1, 2, 2]),
        ([(0, 1), (1, 2)], [Turn(1, 1, True)], [0, 0]),
        # Of a turn that is not to be learned nothing is, whichever of two it comes before.
        ([(0, 1), (1, 4), (4, 5)], [Turn(0, 2, False, 0.0), Turn(3, 5, True)], [3, 3, 2]),
        ([(0, 1), (1, 4), (4, 5)], [Turn(0, 2, False), Turn(3, 5, True, 0.0)], [1, 3, 3]),
        ([(0, 1), (1, 2)], [Turn(0, 2, True, 1e-50)], [3, 3]),
    ],
)
def test_turn_mask(spans: list[tuple[int, int]], turns: list[Turn], mask: list[int]) -> None:
    assert turn_mask(tokens(*spans), turns).tolist() == mask


@pytest.mark.parametrize(
    ("turns", "weights"),
    [
        ([Turn(0, 2, False), Turn(3, 5, True)], None),
        ([Turn(0, 2, False, 0.0), Turn(3, 5, True)], None),
        ([Turn(1, 1, False, 2.0), Turn(3, 5, True)], None),
        ([Turn(3, 5, True, 0.5)], [1, 0.5, 0.5, 1]),
        # A token of two turns has the smaller weight.
        ([Turn(0, 2, False, 0.25), Turn(3, 5, True, 0.5)], [0.25, 0.25, 0.5, 1]),
        ([Turn(0, 2, False, 3.0), Turn(3, 5, True)], [3, 1, 1, 1]),
        ([Turn(0, 2, False, 0.0), Turn(3, 5, True, 4.0)], [1, 4, 4, 1]),
    ],
)
def test_turn_weights(turns: list[Turn], weights: list[float] | None) -> None:
    found = turn_weights(tokens((0, 1), (1, 4), (4, 5), (5, 6)), turns)
    assert (None if found is None else found.tolist()) == weights
    assert found is None or found.dtype == np.float32


def test_normalised_characters_keep_their_places(tmp_path: Path) -> None:
    rust = RustTokenizer(models.WordLevel({"<unk>": 0, "a": 1, "é": 2, "b": 3}, unk_token="<unk>"))
    rust.normalizer = normalizers.NFC()
    rust.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=rust).save_pretrained(tmp_path)
    [found] = OffsetTokenizer(require_offsets(load_tokenizer(tmp_path))).encode_batch(["ae\u0301b"])
    assert found.ids.tolist() == [1, 2, 3]
    assert turn_mask(found, [Turn(1, 3, True)]).tolist() == [0, 2, 0]
    assert turn_mask(found, [Turn(3, 4, True)]).tolist() == [0, 0, 2]
