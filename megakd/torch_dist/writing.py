"""A distributed checkpoint written by one process that never holds more than a piece of it."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import BytesIOWriteData, TensorWriteData, WriteItem, WriteItemType
from torch.serialization import get_crc32_options, set_crc32_options

from megakd.common.piecewise_file import PiecewiseFile
from megakd.torch_dist.reading import COMMON_FILE


@dataclass(frozen=True)
class Piece:
    """A block of the tensor `key` of full shape `shape`, made when it is written."""

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return torch.Size(self.sizes).numel() * self.dtype.itemsize


def write_checkpoint(
    folder: Path,
    pieces: Sequence[Piece],
    objects: Mapping[str, Any],
    common: Mapping[str, Any],
    written: Callable[[int], None],
) -> None:
    """Write what megatron-core's `dist_checkpointing.load` reads, and flush it to the disk.

    Args:
        objects: by key, what goes beside the tensors.
        common: content of common.pt.
        written: called with the size of every piece.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    planner = _LazyPlanner(pieces, objects, written)
    # With more threads an error in one of them would go unnoticed; with copies ahead more than a piece would be held.
    writer = dcp.FileSystemWriter(folder, sync_files=True, thread_count=1, per_thread_copy_ahead=0)
    writer.fs = _PiecewiseFiles()
    checksums = get_crc32_options()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            # Two thirds of the time otherwise, for sums that torch.load does not look at.
            set_crc32_options(False)
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    except dcp.api.CheckpointException as error:
        raise _reason(next(iter(error.failures.values()))[0]) from error
    finally:
        set_crc32_options(checksums)
    # Not by torch.save, whose own files say "RuntimeError" where the disk is full.
    (folder / COMMON_FILE).write_bytes(_saved(dict(common)))
    # What megatron-core's dist_checkpointing looks for first.
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    versions = {f"{backend}_version": 1 for backend in backends}
    (folder / "metadata.json").write_text(json.dumps(backends | versions), encoding="utf-8")


class _PiecewiseFiles(FileSystem):
    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """As FileSystem's, but see PiecewiseFile."""
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
        else:
            with io.BufferedWriter(PiecewiseFile(os.fspath(path))) as stream:
                yield stream


class _LazyPlanner(SavePlanner):
    def __init__(self, pieces: Sequence[Piece], objects: Mapping[str, Any], written: Callable[[int], None]) -> None:
        self._pieces = {MetadataIndex(piece.key, piece.offsets): piece for piece in pieces}
        self._objects = {MetadataIndex(key): _saved(value) for key, value in objects.items()}
        self._written = written

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing to do: the pieces are known."""

    def create_local_plan(self) -> SavePlan:
        """One write per piece and object."""
        tensors = [
            WriteItem(
                index,
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes)),
                    TensorProperties(dtype=piece.dtype),
                    torch.Size(piece.shape),
                ),
            )
            for index, piece in self._pieces.items()
        ]
        objects = [
            WriteItem(index, WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(len(value)))
            for index, value in self._objects.items()
        ]
        return SavePlan([*tensors, *objects])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The local plan and its metadata."""
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Make a piece; the writer asks for the next one when this one is written."""
        if write_item.type is WriteItemType.BYTE_IO:
            return io.BytesIO(self._objects[write_item.index])
        piece = self._pieces[write_item.index]
        tensor = piece.read()
        assert tuple(tensor.shape) == piece.sizes and tensor.dtype is piece.dtype, piece
        self._written(piece.nbytes)
        return tensor


def _reason(error: BaseException) -> BaseException:
    """What ended the writing: torch's zip writer, closed after an error within it, hides that with a RuntimeError."""
    link: BaseException | None = error
    while isinstance(link, RuntimeError):
        link = link.__cause__ or link.__context__
    return link if isinstance(link, (OSError, KeyboardInterrupt)) else error


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()
