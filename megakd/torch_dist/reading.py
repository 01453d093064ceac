"""A distributed checkpoint's tensors by key, block by block, on one process and without torch.distributed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megakd.common.errors import UserError, nearest
from megakd.torch_dist.records import DAMAGES, MappedFiles
from megakd.torch_dist.unpickling import load_metadata, load_object

METADATA_FILE = ".metadata"
COMMON_FILE = "common.pt"
TRACKER_FILE = "latest_checkpointed_iteration.txt"
_REMEDY = "Copy or write the checkpoint again."


def checkpoint_folder(path: str | Path) -> Path | None:
    """The folder with the tensors: `path`, or the one Megatron-LM's tracker file names; None where there is none.

    Raises:
        UserError: the tracker file names no folder that is there.
    """
    path = Path(path)
    if (path / METADATA_FILE).is_file():
        return path
    tracker = path / TRACKER_FILE
    if not tracker.is_file():
        return None
    word = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if word != "release" and re.fullmatch("[0-9]{1,18}", word) is None:
        raise UserError(f"{tracker} says {word[:40]!r}; it must be an iteration or release. Copy the checkpoint again.")
    folder = path / (word if word == "release" else f"iter_{int(word):07d}")
    if not (folder / METADATA_FILE).is_file():
        raise UserError(
            f"{tracker} says {word}, and {folder} holds no checkpoint in torch_dist format ({METADATA_FILE}). Copy "
            "the checkpoint again, or save it with Megatron-LM's --ckpt-format torch_dist."
        )
    return folder


class TorchDistFolder:
    """The tensors of a checkpoint; a block is read when it is asked for.

    Raises:
        UserError: the checkpoint is damaged, or its metadata asks for more than a checkpoint's classes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metadata = read_metadata(path)
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        for key, entry in self._tensors.items():
            if not _makes_sense(entry):
                raise UserError(f"{path / METADATA_FILE} speaks of {key} in a way that makes no sense. {_REMEDY}")
        self._chunks = {key: _ChunkIndex(entry.chunks) for key, entry in self._tensors.items()}
        self._files = MappedFiles(path)

    @property
    def keys(self) -> list[str]:
        """Keys of all tensors."""
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        return tuple(self._entry(key).size)

    def dtype(self, key: str) -> torch.dtype:
        """Type of a tensor."""
        return self._entry(key).properties.dtype

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """A block of a tensor, put together from the pieces that hold it; one that lies in a piece is not copied.

        Raises:
            UserError: a piece or its file is missing or damaged.
        """
        entry = self._entry(key)
        block = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        chunks = self._chunks[key].near(offsets, sizes)
        items = create_read_items_for_chunk_list(key, replace(entry, chunks=chunks), [block])
        if sum(math.prod(item.lengths) for item in items) != math.prod(sizes) or _overlap(items):
            raise UserError(f"{self.path} holds {key} in part only, or parts of it twice. {_REMEDY}")
        shapes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in chunks}
        parts = [self._part(key, item, shapes) for item in items]
        if len(parts) == 1:
            return parts[0]
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        for item, part in zip(items, parts, strict=True):
            target[_slices(item.dest_offsets, item.lengths)] = part
        return target

    def _part(self, key: str, item: ReadItem, shapes: Mapping[tuple[int, ...], tuple[int, ...]]) -> Tensor:
        """What an item asks for, over the file's own bytes where that can be."""
        try:
            info = self._metadata.storage_data[item.storage_index]
            piece = self._files.tensor(info.relative_path, info.offset, info.length)
        except DAMAGES as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"{key} in {self.path} cannot be read ({reason}). {_REMEDY}") from error
        assert item.storage_index.offset is not None
        dtype, shape = self.dtype(key), shapes[tuple(item.storage_index.offset)]
        if piece.dtype is not dtype or tuple(piece.shape) != shape:
            raise UserError(
                f"{info.relative_path} in {self.path} holds {piece.dtype} {list(piece.shape)} in the place of a piece "
                f"of {key}, {dtype} {list(shape)}. {_REMEDY}"
            )
        return piece[_slices(item.storage_offsets, item.lengths)]

    def _entry(self, key: str) -> TensorStorageMetadata:
        if key not in self._tensors:
            raise UserError(f"{self.path} has no tensor {key}.{nearest(key, self._tensors)}")
        return self._tensors[key]


def read_metadata(path: Path) -> Metadata:
    """A checkpoint's metadata; what is unpickled runs no code and names files of its own folder only.

    Raises:
        UserError: it is missing, damaged, or asks for more.
    """
    file = path / METADATA_FILE
    try:
        with file.open("rb") as stream:
            metadata = load_metadata(stream, file)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}). {_REMEDY}") from error
    for info in metadata.storage_data.values():
        name = info.relative_path
        if Path(name).name != name or name in ("", "..") or "\0" in name:
            raise UserError(f"{file} names {name!r}, which is not a file of its folder.")
        if info.transform_descriptors:
            raise UserError(f"{file} says that {name} is compressed, which is not supported. Save it as it is.")
    return metadata


def check_pickles(path: Path) -> None:
    """Refuse a checkpoint whose pickles, all of them, hold more than tensors, plain values and checkpoint metadata.

    For loaders that would unpickle anything: run it before them.

    Raises:
        UserError: one does, or is damaged.
    """
    metadata = read_metadata(path)
    for index, info in metadata.storage_data.items():
        if not isinstance(metadata.state_dict_metadata.get(index.fqn), TensorStorageMetadata):
            load_object(_stored(path / info.relative_path, info.offset, info.length), path / info.relative_path)
    if (path / COMMON_FILE).is_file():
        load_object(path / COMMON_FILE, path / COMMON_FILE)


def _stored(file: Path, offset: int, length: int) -> bytes:
    try:
        with file.open("rb") as stream:
            stream.seek(offset)
            return stream.read(min(length, file.stat().st_size))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}). {_REMEDY}") from error


def _makes_sense(entry: TensorStorageMetadata) -> bool:
    """Whether every chunk lies in its tensor; whether they cover a block is seen when it is read."""
    return bool(entry.chunks) and all(
        len(chunk.offsets) == len(chunk.sizes) == len(entry.size)
        and all(
            o >= 0 and n >= 0 and o + n <= whole
            for o, n, whole in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
        )
        for chunk in entry.chunks
    )


def _overlap(items: Sequence[ReadItem]) -> bool:
    """Whether two items fill the same place."""
    bounds = [[(o, o + n) for o, n in zip(item.dest_offsets, item.lengths, strict=True)] for item in items]
    return any(
        all(a[0] < b[1] and b[0] < a[1] for a, b in zip(one, other, strict=True))
        for one, other in combinations(bounds, 2)
    )


def _slices(offsets: Sequence[int], lengths: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))


class _ChunkIndex:
    """The chunks of a tensor by layer, and by expert, where each is of one: there may be thousands."""

    def __init__(self, chunks: list[ChunkStorageMetadata]) -> None:
        dims = len(chunks[0].sizes)
        self._lead = next((dim for dim in range(dims) if any(chunk.sizes[dim] != 1 for chunk in chunks)), dims)
        self._all = chunks
        self._by_place: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
        for chunk in chunks:
            self._by_place.setdefault(tuple(chunk.offsets[: self._lead]), []).append(chunk)

    def near(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> list[ChunkStorageMetadata]:
        """Chunks that may hold part of a block."""
        if any(size != 1 for size in sizes[: self._lead]):
            return self._all
        return self._by_place.get(tuple(offsets[: self._lead]), [])
