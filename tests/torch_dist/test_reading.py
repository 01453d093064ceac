"""Blocks of tensors of a checkpoint, over the file's own bytes where they lie in one piece."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megakd.common.errors import UserError
from megakd.torch_dist import Piece, TorchDistFolder, write_checkpoint
from megakd.torch_dist.records import MappedFiles


def write(folder: Path, full: torch.Tensor, rows: int, key: str = "layers.weight") -> TorchDistFolder:
    """A tensor [layers, rows, columns] in pieces of some rows of a layer."""
    pieces = [
        Piece(key, tuple(full.shape), (layer, start, 0), (1, min(rows, full.shape[1] - start), full.shape[2]),
              full.dtype, lambda layer=layer, start=start: full[layer : layer + 1, start : start + rows].clone())
        for layer in range(full.shape[0]) for start in range(0, full.shape[1], rows)
    ]  # fmt: skip
    folder.mkdir(exist_ok=True)
    write_checkpoint(folder, pieces, {}, {}, lambda count: None)
    return TorchDistFolder(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("offsets", "sizes"),
    [
        ((0, 0, 0), (1, 4, 6)),
        ((1, 4, 0), (1, 4, 6)),
        ((2, 5, 2), (1, 2, 3)),
        ((1, 2, 1), (1, 7, 4)),
        ((0, 0, 0), (3, 10, 6)),
    ],
)
def test_a_block_is_what_was_written(
    tmp_path: Path, dtype: torch.dtype, offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    full = torch.randn(3, 10, 6).to(dtype)
    block = write(tmp_path, full, 4).read("layers.weight", offsets, sizes)
    assert torch.equal(block, full[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))])


def test_a_block_of_one_piece_is_not_copied(tmp_path: Path) -> None:
    folder = write(tmp_path, torch.randn(2, 8, 6), 4)
    one, other = (folder.read("layers.weight", (1, 4 + first, 0), (1, 2, 6)) for first in (0, 2))
    assert other.data_ptr() == one.data_ptr() + 2 * 6 * 4
    spread = folder.read("layers.weight", (1, 2, 0), (1, 4, 6))
    one.fill_(7.0)
    assert not (spread == 7.0).any(), "what is put together is a copy"
    assert torch.equal(spread, TorchDistFolder(tmp_path).read("layers.weight", (1, 2, 0), (1, 4, 6)))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_torch_wrote_itself(tmp_path: Path) -> None:
    """Its writer saves a transposed tensor with its strides, and one element without dimensions."""
    state = {"transposed": torch.randn(6, 4).t(), "number": torch.tensor(3.0), "rows": torch.randn(9, 2)[3:7]}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    folder = TorchDistFolder(tmp_path)
    for key, value in state.items():
        shape = tuple(value.shape)
        assert torch.equal(folder.read(key, (0,) * len(shape), shape), value), key


def test_records_in_another_form_are_copied(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        places = []
        for value in (torch.randn(3, 4), torch.randn(4, 4).t(), torch.randn(5, 4)[1:], {"not": "a tensor"}):
            start = file.tell()
            torch.save(value, file)
            places.append((value, start, file.tell() - start))
    files = MappedFiles(tmp_path)
    for value, start, length in places[:3]:
        assert torch.equal(files.tensor("file", start, length), value)
    with pytest.raises(ValueError, match="it is a dict, not a tensor"):
        files.tensor("file", *places[3][1:])


@pytest.mark.parametrize("kept", [0, 100, 700])
def test_a_cut_file_is_told(tmp_path: Path, kept: int) -> None:
    folder = write(tmp_path, torch.randn(1, 4, 100), 4)
    file = next(tmp_path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"layers\.weight in .* cannot be read .*Copy or write the checkpoint again"):
        folder.read("layers.weight", (0, 0, 0), (1, 4, 100))


KEY = "layers.weight"


def places(metadata: Any, key: str) -> list[Any]:
    return [index for index in metadata.storage_data if index.fqn == key]


def point(metadata: Any, target: str) -> None:
    """Let the first piece of the tensor stand where another key's is."""
    metadata.storage_data[places(metadata, KEY)[0]] = metadata.storage_data[places(metadata, target)[0]]


def change_info(metadata: Any, **changes: Any) -> None:
    index = places(metadata, KEY)[0]
    metadata.storage_data[index] = dataclasses.replace(metadata.storage_data[index], **changes)


def change_chunk(metadata: Any, **changes: Any) -> None:
    chunks = metadata.state_dict_metadata[KEY].chunks
    chunks[0] = dataclasses.replace(chunks[0], **changes)


def set_chunks(metadata: Any, change: Callable[[list[Any]], list[Any]]) -> None:
    entry = metadata.state_dict_metadata[KEY]
    entry.chunks = change(entry.chunks)


DAMAGE: dict[str, Callable[[Any], object]] = {
    "a smaller tensor there": lambda m: point(m, "small"),
    "a larger tensor there": lambda m: point(m, "large"),
    "another type there": lambda m: point(m, "integers"),
    "an object there": lambda m: point(m, "object"),
    "another type in the metadata": lambda m: setattr(m.state_dict_metadata[KEY].properties, "dtype", torch.int32),
    "no type": lambda m: setattr(m.state_dict_metadata[KEY].properties, "dtype", "float32"),
    "no chunks": lambda m: set_chunks(m, lambda chunks: []),
    "a chunk missing": lambda m: set_chunks(m, lambda chunks: chunks[1:]),
    "a chunk twice": lambda m: set_chunks(m, lambda chunks: [chunks[0], *chunks]),
    "a chunk twice in another's place": lambda m: set_chunks(m, lambda chunks: [chunks[0], chunks[0], *chunks[2:]]),
    "a chunk before the start": lambda m: change_chunk(m, offsets=torch.Size([0, -1, 0])),
    "a chunk beyond the end": lambda m: change_chunk(m, offsets=torch.Size([0, 7, 0])),
    "a chunk of other dimensions": lambda m: change_chunk(m, sizes=torch.Size([4, 6])),
    "a size in words": lambda m: change_chunk(m, sizes=("one", 4, 6)),
    "no storage": lambda m: m.storage_data.clear(),
    "an offset beyond the file": lambda m: change_info(m, offset=10**9),
    "a negative offset": lambda m: change_info(m, offset=-1),
    "a length beyond the file": lambda m: change_info(m, length=10**9),
    "a length in words": lambda m: change_info(m, length="all"),
    "an offset inside a record": lambda m: change_info(m, offset=17),
    "a file that is not there": lambda m: change_info(m, relative_path="__1_0.distcp"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_metadata_is_told_and_never_misread(tmp_path: Path, name: str) -> None:
    full = torch.randn(2, 8, 6)
    pieces = [
        Piece(KEY, (2, 8, 6), (layer, start, 0), (1, 4, 6), full.dtype,
              lambda layer=layer, start=start: full[layer : layer + 1, start : start + 4].clone())
        for layer in range(2) for start in (0, 4)
    ]  # fmt: skip
    for key, other in {
        "small": torch.randn(1, 3, 6), "large": torch.randn(2, 4, 6), "integers": torch.ones(1, 4, 6, dtype=torch.int32)
    }.items():  # fmt: skip
        pieces.append(
            Piece(key, tuple(other.shape), (0, 0, 0), tuple(other.shape), other.dtype, lambda other=other: other)
        )
    write_checkpoint(tmp_path, pieces, {"object": [None]}, {}, lambda count: None)
    file = tmp_path / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    DAMAGE[name](metadata)
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError) as caught:
        folder = TorchDistFolder(tmp_path)
        for offsets, sizes in (((0, 0, 0), (2, 8, 6)), ((0, 0, 0), (1, 4, 6))):
            assert not torch.equal(folder.read(KEY, offsets, sizes), full[: sizes[0], : sizes[1]]), "nothing changed"
    assert "\n" not in str(caught.value)
    assert "Copy or write the checkpoint again" in str(caught.value)
