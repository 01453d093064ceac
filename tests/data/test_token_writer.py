"""What TokenWriter writes is byte for byte what megatron-core's builder writes."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megakd.data import token_writer
from megakd.data.token_writer import TokenWriter, lengths_path, token_dtype, write_index


def write(prefix: Path, texts: list[list[int]], dtype: np.dtype, **opened_at: int) -> None:
    writer = TokenWriter(prefix, dtype, **opened_at)
    for document in texts:
        writer.add(np.array(document, dtype=np.int32), np.array([len(document)], dtype=np.int32))
    writer.finish()


def write_with_megatron(prefix: Path, documents: list[list[int]], dtype: np.dtype) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype.type)
    for document in documents:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(f"{prefix}.idx")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("token_writer")


@settings(max_examples=40)
@given(
    documents=st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=9), max_size=12),
    dtype=st.sampled_from([np.dtype(np.uint16), np.dtype(np.int32), np.dtype(np.uint8)]),
    block=st.integers(1, 5),
)
def test_both_files_are_megatron_s(folder: Path, documents: list[list[int]], dtype: np.dtype, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_writer, "BLOCK", block)
        write(folder / "ours", documents, dtype)
    write_with_megatron(folder / "theirs", documents, dtype)
    for ending in ("bin", "idx"):
        assert (folder / f"ours.{ending}").read_bytes() == (folder / f"theirs.{ending}").read_bytes()
    if documents:
        dataset = IndexedDataset(str(folder / "ours"))
        assert [dataset[i].tolist() for i in range(len(dataset))] == documents


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, np.uint16), (65500, np.int32)])
def test_the_vocabulary_s_integers(vocab_size: int, dtype: type) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype)


def test_what_lies_behind_the_place_it_is_opened_at_is_cut_off(tmp_path: Path) -> None:
    dtype = token_dtype(1000)
    write(tmp_path / "part", [[1, 2, 3], [4], [5, 6]], dtype)
    write(tmp_path / "part", [[7, 8]], dtype, documents=2, tokens=4)
    write(tmp_path / "whole", [[1, 2, 3], [4], [7, 8]], dtype)
    for ending in ("bin", "idx", "lengths"):
        assert (tmp_path / f"part.{ending}").read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()


def test_id_outside_the_file_s_integers(tmp_path: Path) -> None:
    writer = TokenWriter(tmp_path / "train", token_dtype(1000))
    with pytest.raises(OverflowError, match="token id 70000 is over 65535"):
        writer.add(np.array([1, 70000]), np.array([2], dtype=np.int32))
    writer.close()


def test_memory_of_the_index_does_not_grow_with_the_documents(tmp_path: Path) -> None:
    count = 3_000_000
    lengths_path(tmp_path / "train").write_bytes(np.ones(count, dtype=np.int32).tobytes())
    tracemalloc.start()
    write_index(tmp_path / "train", token_dtype(1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "train.idx").stat().st_size == 34 + 12 * count + 8 * (count + 1)
    assert peak < 4 * count
