"""Token files are megatron-core's own, and the stream over them is their concatenation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megakd.common.errors import UserError
from megakd.data.indexed import TokenStream
from megakd.data.token_writer import TokenWriter, token_dtype


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 1000) -> None:
    writer = TokenWriter(prefix, token_dtype(vocab_size))
    lengths = np.array([len(document) for document in documents], dtype=np.int32)
    writer.add(np.array(sum(documents, []), dtype=np.int64), lengths)
    writer.finish()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("indexed")


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, np.uint16), (65500, np.int32)])
def test_round_trip_through_megatron(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    documents = [[5, 6, 7], [8], [vocab_size - 1, 0]]
    write(tmp_path / "train", documents, vocab_size)
    dataset = IndexedDataset(str(tmp_path / "train"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == documents
    assert dataset[0].dtype == dtype
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]
    stream = TokenStream(tmp_path / "train")
    assert (stream.num_documents, stream.num_tokens) == (3, 6)
    whole = stream.slice(0, 6)
    assert whole.dtype == np.int64 and whole.tolist() == sum(documents, [])


@settings(max_examples=30)
@given(
    documents=st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=7), min_size=1, max_size=8),
    data=st.data(),
)
def test_any_slice_is_the_concatenation_s(folder: Path, documents: list[list[int]], data: st.DataObject) -> None:
    write(folder / "any", documents)
    tokens = sum(documents, [])
    stream = TokenStream(folder / "any")
    start = data.draw(st.integers(0, len(tokens)))
    stop = data.draw(st.integers(start, len(tokens)))
    assert stream.slice(start, stop).tolist() == tokens[start:stop]


def test_files_of_several_sequences_per_document(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "train.bin"), dtype=np.int32)
    builder.add_document(np.array([1, 2, 3, 4]), [1, 3])
    builder.add_item(torch.tensor([5]))
    builder.add_item(torch.tensor([6, 7]))
    builder.end_document()
    builder.add_document(np.array([8, 9]), [2])
    builder.finalize(str(tmp_path / "train.idx"))
    stream = TokenStream(tmp_path / "train")
    assert (stream.num_documents, stream.num_tokens) == (3, 9)
    assert stream.slice(0, 9).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_slice_is_the_caller_s_own(tmp_path: Path) -> None:
    write(tmp_path / "train", [[1, 2, 3]])
    stream = TokenStream(tmp_path / "train")
    stream.slice(0, 3)[:] = 0
    assert stream.slice(0, 3).tolist() == [1, 2, 3]


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_missing_file(tmp_path: Path, ending: str) -> None:
    write(tmp_path / "train", [[1, 2, 3]])
    (tmp_path / f"train{ending}").unlink()
    with pytest.raises(UserError, match=rf"data.valid is .*train; .*train{ending} does not exist. .*preprocess_data"):
        TokenStream(tmp_path / "train", key="data.valid")


def test_ending_in_the_path(tmp_path: Path) -> None:
    write(tmp_path / "train", [[1, 2, 3]])
    with pytest.raises(UserError, match=r"Give the path without its ending: .*/train\.$"):
        TokenStream(tmp_path / "train.bin")


@pytest.mark.parametrize("change", [-2, 2])
def test_data_of_another_size_than_the_index_says(tmp_path: Path, change: int) -> None:
    write(tmp_path / "train", [[1, 2, 3], [4]])
    data = (tmp_path / "train.bin").read_bytes()
    (tmp_path / "train.bin").write_bytes(data[:change] if change < 0 else data + b"\0" * change)
    with pytest.raises(UserError, match=rf"train.bin is {8 + change} bytes but .*train.idx speaks of 8"):
        TokenStream(tmp_path / "train")


def test_truncated_index(tmp_path: Path) -> None:
    write(tmp_path / "train", [[1, 2, 3], [4]])
    index = (tmp_path / "train.idx").read_bytes()
    (tmp_path / "train.idx").write_bytes(index[:-3])
    with pytest.raises(UserError, match=f"is {len(index) - 3} bytes but its header says {len(index)}"):
        TokenStream(tmp_path / "train")


@pytest.mark.parametrize("index", [b"", b"short", b"NOTMAGIC\0" + b"\0" * 60, b"MMIDIDX\0\0" + b"\x09" * 60])
def test_wrong_magic(tmp_path: Path, index: bytes) -> None:
    write(tmp_path / "train", [[1, 2, 3]])
    (tmp_path / "train.idx").write_bytes(index)
    with pytest.raises(UserError, match="is no index of megatron-core's token files"):
        TokenStream(tmp_path / "train")


def test_empty_corpus(tmp_path: Path) -> None:
    write(tmp_path / "train", [])
    with pytest.raises(UserError, match="train.bin holds no tokens"):
        TokenStream(tmp_path / "train")
