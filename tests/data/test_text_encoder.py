"""Records become [bos] text eos, and what is no text becomes a problem in its place."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import sentencepiece

from megakd.data.records import EMPTY, Encoded, Problem
from megakd.data.text_encoder import TextSettings
from megakd.data.tokenizer import load_tokenizer


@pytest.mark.parametrize(("bos", "eod"), [(True, True), (True, False), (False, True), (False, False)])
def test_each_record_has_its_result_in_its_place(sentencepiece_file: Path, bos: bool, eod: bool) -> None:
    settings = TextSettings(key="body", append_eod=eod, prepend_bos=bos)
    encoder = pickle.loads(pickle.dumps(settings)).build(load_tokenizer(sentencepiece_file))
    values = ["one two", "", None, "a\ud800", 7, "größer\0", ["x"]]
    results = encoder.encode([{"body": value} for value in values])
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    for value in (0, 5):
        document = results[value]
        assert isinstance(document, Encoded) and document.mask is None
        assert document.ids.tolist() == [1] * bos + reference.encode(values[value]) + [2] * eod
    assert results[1] is EMPTY
    problems = [results[i] for i in (2, 3, 4, 6)]
    assert all(isinstance(problem, Problem) for problem in problems)
    assert [str(problem) for problem in problems] == [
        "wrong type: 'body' is a null, not a string",
        "half a surrogate pair: 'body' has one, which is no text",
        "wrong type: 'body' is a int, not a string",
        "wrong type: 'body' is a list, not a string",
    ]
    assert encoder.encode([]) == []
