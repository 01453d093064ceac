"""Documents are encoded in order, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megakd.common.errors import UserError
from megakd.data import encoding
from megakd.data.encoding import encode_documents
from megakd.data.tokenizer import load_tokenizer


def test_processes_give_the_same_ids_in_order(
    sentencepiece_file: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "CHUNK_DOCUMENTS", 3)
    tokenizer = load_tokenizer(sentencepiece_file)
    documents = [f"{text}{i}" for i in range(10) for text in corpus]
    expected = [tokenizer.encode(document) for document in documents]
    assert list(encode_documents(documents, tokenizer, workers=1)) == expected
    assert list(encode_documents(documents, tokenizer, workers=2)) == expected


def test_documents_are_read_as_they_are_needed(sentencepiece_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "CHUNK_CHARACTERS", 10)
    read: list[int] = []

    def documents() -> Iterator[str]:
        for i in range(100):
            read.append(i)
            yield "0123456789"

    encoded = encode_documents(documents(), load_tokenizer(sentencepiece_file))
    next(encoded)
    assert read == [0]


def test_workers_below_one(sentencepiece_file: Path) -> None:
    with pytest.raises(UserError, match="--workers is 0; it must be at least 1"):
        list(encode_documents(["x"], load_tokenizer(sentencepiece_file), workers=0))
