"""A distributed checkpoint's tensors by key, block by block, on one process and without torch.distributed."""

from __future__ import annotations

import math
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan, Metadata
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megakd.common.errors import UserError, nearest
from megakd.torch_dist.records import MappedFiles
from megakd.torch_dist.unpickling import load_metadata, load_object

METADATA_FILE = ".metadata"
COMMON_FILE = "common.pt"
TRACKER_FILE = "latest_checkpointed_iteration.txt"


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
        self._reader = _Reader(path)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
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
        if sum(math.prod(item.lengths) for item in items) != math.prod(sizes):
            raise UserError(f"{self.path} holds {key} in part only. Copy or write the checkpoint again.")
        try:
            if len(items) == 1 and (part := self._mapped(items[0])) is not None:
                return part
            target = torch.empty(sizes, dtype=entry.properties.dtype)
            self._reader.read_data(LoadPlan(items), _IntoOne(target)).wait()
        except (OSError, RuntimeError, EOFError, KeyError, AssertionError, ValueError, zipfile.BadZipFile) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"{key} in {self.path} cannot be read ({reason}). Copy or write the checkpoint again."
            ) from error
        return target

    def _mapped(self, item: ReadItem) -> Tensor | None:
        info = self._metadata.storage_data[item.storage_index]
        if getattr(info, "transform_descriptors", None):
            return None
        piece = self._files.tensor(info.relative_path, info.offset, info.length)
        if piece is None:
            return None
        return piece[tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))]

    def _entry(self, key: str) -> TensorStorageMetadata:
        if key not in self._tensors:
            raise UserError(f"{self.path} has no tensor {key}.{nearest(key, self._tensors)}")
        return self._tensors[key]


def check_pickles(path: Path) -> None:
    """Refuse a checkpoint whose pickles, all of them, hold more than tensors, plain values and checkpoint metadata.

    For loaders that would unpickle anything: run it before them.

    Raises:
        UserError: one does, or is damaged.
    """
    metadata = _Reader(path).read_metadata()
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
        raise UserError(f"{file} cannot be read ({error.strerror}). Copy or write the checkpoint again.") from error


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """As FileSystemReader's, but what is unpickled runs no code and names files of its own folder only."""
        file = Path(self.path) / METADATA_FILE
        try:
            with file.open("rb") as stream:
                metadata = load_metadata(stream, file)
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}). Copy or write the checkpoint again.") from error
        for info in metadata.storage_data.values():
            name = info.relative_path
            if Path(name).name != name or name in ("", "..") or "\0" in name:
                raise UserError(f"{file} names {name!r}, which is not a file of its folder.")
            if info.transform_descriptors:
                raise UserError(f"{file} says that {name} is compressed, which is not supported. Save it as it is.")
        return metadata


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


class _IntoOne(DefaultLoadPlanner):
    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The one tensor that is filled."""
        return self._target
