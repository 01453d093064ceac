"""Writes a rank's part of a checkpoint, in the background too: a copy is taken first, since training goes on.

megatron-core plans who writes what. Its own ways to write fork processes, which share the memory of live tensors on
CPU; here a thread writes from copies that are kept from one checkpoint to the next.
"""

from __future__ import annotations

import io
import json
import os
import queue
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from safetensors.torch import save as to_safetensors
from torch import Tensor
from torch.distributed.checkpoint.filesystem import (
    SerializationFormat,
    _StorageWriterTransforms,
    _write_item,
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megakd.checkpoint.checksums import HashingFile, file_digest, write_checksums
from megakd.checkpoint.random_states import RANDOM_STATES, gather_random_states
from megakd.checkpoint.record import RECORD, Record, write_record
from megakd.parallel.rank_0 import describe_os_error, on_rank_0
from megakd.torch_dist.reading import COMMON_FILE, METADATA_FILE

# megatron-core would make a queue served by a spawned process, which runs a script without `if __name__ == "__main__"`
# again and outlives a rank that is killed. It is not used here.
filesystem_async._results_queue = queue.Queue()

# One for the process: what a run that failed had begun to write is over before the next run writes there.
_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="megakd-checkpoint")

_Item = tuple[WriteItem, io.BytesIO | Tensor]


class _Planned(FileSystemWriterAsync):
    """What megatron-core's planning leaves this rank to write: live tensors."""

    items: list[_Item]
    prefix: str

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Take the plan; nothing is copied."""
        self.items = [(item, planner.resolve_data(item)) for item in plan.items]
        self.prefix = plan.storage_data.prefix


@dataclass
class _Written:
    """What a rank reports when its part is on disk."""

    results: list[WriteResult] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)


@dataclass
class _Save:
    """A checkpoint being written: what rank 0 needs to end it."""

    folder: Path
    planned: _Planned
    metadata: Metadata | None
    record: Record
    random_states: dict[str, Tensor]
    writing: Future[_Written]


class CheckpointWriter:
    """Writes one checkpoint after another into folders that exist. All calls but `is_written` are collective."""

    def __init__(self) -> None:
        self._copies: dict[tuple[Any, ...], Tensor] = {}
        self._save: _Save | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint was started and not finished; the same on every rank."""
        return self._save is not None

    @property
    def is_written(self) -> bool:
        """Whether this rank's part is on disk, or failed."""
        return self._save is not None and self._save.writing.done()

    def start(self, folder: Path, state: dict[str, Any], record: Record, *, waits: bool) -> None:
        """Begin to write a sharded state dict; `finish` must follow.

        Args:
            waits: `finish` is called before anything changes, so that nothing need be copied.
        """
        assert self._save is None, "finish comes first"
        sharded, common = save_preprocess(state)
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        planned = _Planned(str(folder))
        (_, metadata, _), *_ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(flat, False), planned, None, 0,
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )  # fmt: skip
        random_states = gather_random_states()
        files = {}
        if dist.get_rank() == 0:
            stream = io.BytesIO()
            torch.save(common, stream)
            files[COMMON_FILE] = stream.getbuffer()
        items = planned.items if waits else [(item, self._copied(item, data)) for item, data in planned.items]
        if not waits and torch.cuda.is_available():
            torch.cuda.synchronize()
        writing = _thread.submit(_write, folder, f"{planned.prefix}0.distcp", items, files)
        self._save = _Save(folder, planned, metadata, record, random_states, writing)

    def finish(self) -> str | None:
        """Wait until every rank has written, and complete the folder. Returns what went wrong on a disk, if anything.

        The folder holds its SHA256SUMS then, and is on disk.
        """
        assert self._save is not None, "start comes first"
        save, self._save = self._save, None
        mine: _Written | str
        try:
            mine = save.writing.result()
        except OSError as error:
            mine = describe_os_error(error)
        all_of_them: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(all_of_them, mine)
        for rank, part in enumerate(all_of_them):
            if isinstance(part, str):
                return f"rank {rank}: {part}"
        try:
            on_rank_0(lambda: _complete(save, all_of_them))
        except OSError as error:
            return f"rank 0: {describe_os_error(error)}"
        return None

    def _copied(self, item: WriteItem, data: io.BytesIO | Tensor) -> io.BytesIO | Tensor:
        """What is to be written as it is now, in main memory that the next checkpoint uses again."""
        if not isinstance(data, Tensor):
            return data
        key = (item.index.fqn, tuple(item.index.offset or ()))
        held = self._copies.get(key)
        if held is None or held.shape != data.shape or held.dtype != data.dtype:
            held = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.is_cuda)
            self._copies[key] = held
        held.copy_(data, non_blocking=True)
        return held


def _write(folder: Path, name: str, items: list[_Item], files: dict[str, Any]) -> _Written:
    """Write a rank's tensors into one file, and files of bytes beside it. Raises OSError."""
    written = _Written()
    if items:
        with HashingFile(folder / name) as stream:
            try:
                for item, data in items:
                    written.results.append(_write_piece(stream, item, data, name))
            except RuntimeError as error:
                raise (stream.failure or error) from error
            os.fsync(stream.fileno())
        written.digests[name] = stream.digest
    for other, content in files.items():
        with HashingFile(folder / other) as stream:
            stream.write(content)
            os.fsync(stream.fileno())
        written.digests[other] = stream.digest
    return written


def _write_piece(stream: HashingFile, item: WriteItem, data: io.BytesIO | Tensor, name: str) -> WriteResult:
    return _write_item(
        _StorageWriterTransforms(), stream, _in_main_memory(data), item, name, SerializationFormat.TORCH_SAVE
    )


def _in_main_memory(data: io.BytesIO | Tensor) -> io.BytesIO | Tensor:
    """With no more than itself in its storage, all of which torch would write."""
    if not isinstance(data, Tensor):
        return data
    data = data.detach().cpu()
    is_view = data.untyped_storage().size() != data.numel() * data.itemsize
    return data.clone() if is_view else data


def _complete(save: _Save, parts: list[_Written]) -> None:
    """Write what describes the parts; SHA256SUMS last. Raises OSError."""
    folder = save.folder
    digests = {name: digest for part in parts for name, digest in part.digests.items()}
    assert save.metadata is not None
    save.planned.finish(save.metadata, [part.results for part in parts])
    write_record(folder, save.record)
    files = {
        CONFIG_FNAME: json.dumps(asdict(CheckpointingConfig("torch_dist", 1))).encode("ascii"),
        RANDOM_STATES: to_safetensors(save.random_states),
    }
    digests |= _write(folder, "", [], files).digests
    digests |= {name: file_digest(folder / name) for name in (METADATA_FILE, RECORD)}
    write_checksums(folder, digests)
