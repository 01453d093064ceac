"""Blocks of tensors of a checkpoint, over the file's own bytes where they lie in one piece."""

from __future__ import annotations

from pathlib import Path

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
    assert not (folder.read("layers.weight", (1, 2, 0), (1, 4, 6)) == 7.0).any(), "the file was written to"
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


def test_records_in_another_form_are_left_to_torch(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        places = []
        for value in (torch.randn(3, 4), torch.randn(4, 4).t(), torch.randn(5, 4)[1:], {"not": "a tensor"}):
            start = file.tell()
            torch.save(value, file)
            places.append((value, start, file.tell() - start))
    files = MappedFiles(tmp_path)
    found = [files.tensor("file", start, length) for _, start, length in places]
    assert found[0] is not None and torch.equal(found[0], places[0][0])
    assert found[1:] == [None, None, None]


@pytest.mark.parametrize("kept", [0, 100, 700])
def test_a_cut_file_is_told(tmp_path: Path, kept: int) -> None:
    folder = write(tmp_path, torch.randn(1, 4, 100), 4)
    file = next(tmp_path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"layers\.weight in .* cannot be read .*Copy or write the checkpoint again"):
        folder.read("layers.weight", (0, 0, 0), (1, 4, 100))
