"""Records are read in chunks and encoded in order, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from megakd.common.errors import UserError
from megakd.data import encoding
from megakd.data.encoding import Chunk, Entry, encode_chunks, read_chunks
from megakd.data.file_contents import Contents
from megakd.data.sources import DocumentsSource, FileSource
from megakd.data.text_encoder import TextSettings
from megakd.data.tokenizer import load_tokenizer
from tests.data.half_learned import HalfLearnedSettings

PLAIN = TextSettings(append_eod=False)


def chunks_of(texts: list[str], key: str = "text") -> Iterator[Chunk]:
    return read_chunks([DocumentsSource(texts)], [key])


@pytest.mark.parametrize("workers", [1, 2])
def test_the_ids_are_in_order(
    sentencepiece_file: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(encoding, "CHUNK_RECORDS", 3)
    tokenizer = load_tokenizer(sentencepiece_file)
    documents = [f"{text}{i}" for i in range(10) for text in corpus]
    results = list(encode_chunks(chunks_of(documents), tokenizer, PLAIN, workers))
    assert len(results) == 14 and [len(packed.lengths) for _, packed in results] == [3] * 13 + [1]
    expected = [tokenizer.encode(document) for document in documents]
    assert np.concatenate([packed.ids for _, packed in results]).tolist() == sum(expected, [])
    assert np.concatenate([packed.lengths for _, packed in results]).tolist() == list(map(len, expected))


def test_small_sources_share_a_chunk(tmp_path: Path) -> None:
    sources = []
    for name, contents in {"a": b"aa", "b": b"\xff", "c": b"c"}.items():
        (tmp_path / name).write_bytes(contents)
        sources.append(FileSource(tmp_path / name, Contents("text"), len(contents), 0))
    (chunk,) = read_chunks(sources, ["text"])
    assert chunk.records == [{"text": "aa"}, {"text": "c"}] and chunk.position == 4
    assert [(e.source, e.line, str(e.problem)) for e in chunk.entries] == [
        (0, 1, "None"),
        (0, 0, "None"),
        (1, 1, "not UTF-8 text"),
        (1, 0, "None"),
        (2, 1, "None"),
        (2, 0, "None"),
    ]
    (chunk,) = read_chunks(sources, ["text"], start=2)
    assert chunk.records == [{"text": "c"}] and chunk.entries == [Entry(2, 1), Entry(2, 0)]


@pytest.mark.parametrize("workers", [1, 2])
def test_few_documents_are_read_ahead(sentencepiece_file: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(encoding, "CHUNK_CHARACTERS", 10)
    read: list[int] = []

    def documents() -> Iterator[str]:
        for i in range(100):
            read.append(i)
            yield "0123456789"

    chunks = read_chunks([DocumentsSource(documents())], ["text"])
    results = encode_chunks(chunks, load_tokenizer(sentencepiece_file), PLAIN, workers)
    list(islice(results, 10))
    assert len(read) <= 15
    results.close()


@pytest.mark.parametrize(
    ("text", "workers", "message"),
    [
        ("fail", 1, "the template cannot be applied"),
        ("fail", 2, "the template cannot be applied"),
        ("die", 2, "one of the 2 encoding processes ended early"),
    ],
)
def test_a_failing_worker_ends_the_run_with_its_message(
    sentencepiece_file: Path, monkeypatch: pytest.MonkeyPatch, text: str, workers: int, message: str
) -> None:
    monkeypatch.setattr(encoding, "CHUNK_RECORDS", 1)
    chunks = chunks_of(["fine"] * 5 + [text] + ["fine"] * 5, "body")
    results = encode_chunks(chunks, load_tokenizer(sentencepiece_file), HalfLearnedSettings(), workers)
    with pytest.raises(UserError, match=message):
        list(results)


def test_workers_below_one(sentencepiece_file: Path) -> None:
    with pytest.raises(UserError, match="--workers is 0; it must be at least 1"):
        list(encode_chunks(chunks_of(["x"]), load_tokenizer(sentencepiece_file), PLAIN, workers=0))
