"""Writes a teacher cache: the teacher alone over the training samples, its rows to shards."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megakd.cache.folder import TEACHER, CacheFolder
from megakd.cache.layout import job_id
from megakd.cache.manifest import Manifest
from megakd.cache.shards import SHARD_BYTES, ShardSeries
from megakd.common.errors import UserError
from megakd.common.logging import configure_logging, log
from megakd.config.layouts import with_teacher_alone
from megakd.config.schema import Config
from megakd.convert.output_folder import copy_tokenizer_files
from megakd.data.batches import Batch, collate, move
from megakd.parallel.mesh import GroupPool
from megakd.parallel.random_state import seed_megatron
from megakd.parallel.rank_0 import on_rank_0
from megakd.parameters.shapes import num_parameters
from megakd.platform import (
    Platform,
    build_platform,
    communication_timeout,
    detect_accelerations,
    init_distributed,
    resolve_layer_spec,
)
from megakd.teacher.recording import SampleRecord, TeacherRecorder
from megakd.training.architectures import teacher_architecture
from megakd.training.build import build_mesh, build_teacher
from megakd.training.cache_progress import CacheProgress, duration
from megakd.training.teacher_cache import (
    WINDOW,
    cache_codec,
    cache_folder,
    cache_job,
    in_whole_blocks,
    samples_to_store,
    teacher_temperature,
)
from megakd.training.train_data import open_train_data, run_steps

TRIAL_SAMPLES = 32  # of a dry run
_AHEAD = 4  # windows that may wait to be written

T = TypeVar("T")
Extracted = tuple[Batch, tuple[Tensor, ...], int]


def write_cache(config: Config, *, dry_run: bool = False, overwrite: bool = False) -> Manifest | None:
    """Run the teacher over the training samples and write what `config.cache` keeps of it. On every rank.

    Goes on where an earlier run with the same configuration was interrupted. A dry run computes a few samples, says
    how large the cache will be and how long it will take, and writes nothing.

    Returns:
        The cache's manifest on rank 0; None elsewhere and of a dry run.

    Raises:
        UserError: the configuration or a file it names cannot be used, or the folder is another's.
    """
    platform = build_platform()
    init_distributed(platform, communication_timeout(config.safeguards.hang_timeout_seconds))
    configure_logging(dist.get_rank())
    run = _CacheRun(with_teacher_alone(config), platform)
    if dry_run:
        run.try_out()
        return None
    return run.write(overwrite)


class _CacheRun:
    """The objects of a run that writes a cache."""

    def __init__(self, config: Config, platform: Platform) -> None:
        config = in_whole_blocks(config)
        assert config.teacher is not None
        self.config, self.platform = config, platform
        self.path = cache_folder(config)
        pool = GroupPool(communication_timeout(config.safeguards.hang_timeout_seconds))
        self.mesh = build_mesh(config.parallel, pool)
        seed_megatron(config.run.seed, self.mesh)  # megatron-core asks for its random state, dropout or not
        accelerations = detect_accelerations()
        layer_spec = resolve_layer_spec(config.run.layer_spec, accelerations)
        log.info(accelerations.describe())
        self.data = open_train_data(config)
        self.ids = samples_to_store(config, self.data, run_steps(config, self.data))
        self.teacher = build_teacher(config, self.mesh, self.mesh, layer_spec)
        codec = cache_codec(config)
        self.recorder = TeacherRecorder(
            codec,
            temperature=teacher_temperature(config),
            seed=config.run.seed,
            tp_group=self.mesh.groups.tp,
            sequence_parallel=config.parallel.sequence_parallel,
            chunk_mib=config.distill.loss_chunk_mib,
        )
        self.is_writer = self.mesh.is_last_stage and self.mesh.tp_rank == 0
        teacher = teacher_architecture(config)
        log.info(
            f"teacher {config.teacher.path}: {teacher.num_layers} layers, {num_parameters(teacher):,} parameters "
            f"({config.teacher.dtype or config.run.dtype}, {layer_spec} layers) on {self.mesh.describe()}"
        )
        settings = ", ".join(f"{key} {value}" for key, value in codec.settings().items())
        log.info(f"kept of it: {settings}, temperature {teacher_temperature(config):g}")
        for line in self.data.lines:
            log.info(line)

    def write(self, overwrite: bool) -> Manifest | None:
        """See write_cache."""
        job = cache_job(self.config, self.data, self.ids)
        folder: CacheFolder | None = None

        def begin() -> tuple[NDArray[np.int64], int]:
            nonlocal folder
            folder = CacheFolder(self.path, job, overwrite=overwrite)
            self._copy_teacher()
            return folder.done, folder.next_shard

        def finish() -> Manifest | None:
            return folder.finish(self.ids, self._notes()) if folder is not None else None

        try:
            done, next_shard = self._on_rank_0(begin)
            todo = np.setdiff1d(self.ids, done, assume_unique=True)
            going_on = f"; {len(done):,} are there already" if len(done) else ""
            log.info(
                f"{len(self.ids):,} samples of {self.config.data.sequence_length:,} tokens to {self.path}{going_on}"
            )
            first, step = next_shard + self.mesh.dp_rank, self.mesh.dp_size
            self._write_samples(todo, ShardSeries(self.path, job_id(job), first, step, shard_bytes=SHARD_BYTES))
            dist.barrier()
            manifest = self._on_rank_0(finish)
        finally:
            if folder is not None:
                folder.close()
        assert manifest is not None
        log.info(
            f"cache {self.path}: {manifest.samples:,} samples, {manifest.rows:,} tokens, {manifest.bytes:,} bytes, "
            f"{manifest.bytes_per_row:.2f} per token. Train from it with teacher.source=cache teacher.path={self.path}"
        )
        return manifest if dist.get_rank() == 0 else None

    def try_out(self) -> None:
        """Compute a few samples spread over the data and say what the whole will take."""
        places = np.unique(np.linspace(0, len(self.ids) - 1, TRIAL_SAMPLES).astype(np.int64))
        started = time.perf_counter()
        size = rows = 0
        for window in self._windows(self.ids[places]):
            for record in self._encode(window):
                size += len(record.content)
                rows += record.rows
        seconds = time.perf_counter() - started
        figures = torch.tensor([size, rows], dtype=torch.float64, device=self.platform.device)
        dist.all_reduce(figures)
        size, rows = (int(figure) for figure in figures.tolist())
        if not rows:
            raise UserError(f"none of {len(places)} samples has a token that counts. Check data.loss_on and the data.")
        share = len(self.ids) / len(places)
        log.info(
            f"dry run on {len(places)} of {len(self.ids):,} samples: {size / rows:.1f} bytes per token. The cache will "
            f"have {rows * share:,.0f} tokens in {size * share:,.0f} bytes and take {duration(seconds * share)}; "
            f"nothing was written to {self.path}"
        )

    def _write_samples(self, todo: NDArray[np.int64], series: ShardSeries) -> None:
        total, shown = len(self.ids), self.is_writer and self.mesh.dp_rank == 0
        progress = CacheProgress(total=total, done=total - len(todo), ranks=self.mesh.dp_size, shown=shown)
        pending: deque[Future[None]] = deque()

        def save(window: list[Extracted]) -> None:
            for record in self._encode(window):
                series.add(record.sample_id, record.token_hash, record.stored, record.content)
                progress.add(1, record.rows, series.written)

        try:
            with progress, ThreadPoolExecutor(1, thread_name_prefix="megakd-cache") as thread:
                for window in self._windows(todo):
                    pending.append(thread.submit(save, window))
                    if len(pending) > _AHEAD:
                        pending.popleft().result()
                for future in pending:
                    future.result()
            series.close()
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {error.strerror or error}. Make room; the same command goes on after "
                "the shards that are complete."
            ) from error

    def _windows(self, ids: NDArray[np.int64]) -> Iterator[list[Extracted]]:
        """Run the teacher over this data rank's samples; yields what is to be encoded, nothing where others write."""
        size = self.config.data.micro_batch_size
        mine = _share(ids, size, self.mesh.dp_rank, self.mesh.dp_size)
        windows = [mine[start : start + WINDOW] for start in range(0, len(mine), WINDOW)]
        with ThreadPoolExecutor(1, thread_name_prefix="megakd-data") as thread:
            ahead = [thread.submit(self._read, window) for window in windows[:1]]
            for number, window in enumerate(windows):
                batches = ahead.pop().result()
                ahead += [thread.submit(self._read, following) for following in windows[number + 1 : number + 2]]
                signals = self.teacher.signals([move(batch, self.platform.device) for batch in batches])
                found = [
                    (batch, self.recorder.extract(batch, signal), len(part))
                    for batch, signal, part in zip(batches, signals, window, strict=True)
                    if signal is not None
                ]
                if self.is_writer:
                    yield found

    def _read(self, window: list[NDArray[np.int64]]) -> list[Batch]:
        size = self.config.data.micro_batch_size
        # All microbatches have one shape: the last one is filled up.
        return [
            collate(self.data.samples, np.concatenate([ids, np.repeat(ids[-1:], size - len(ids))])) for ids in window
        ]

    def _encode(self, window: list[Extracted]) -> Iterator[SampleRecord]:
        for batch, extracted, count in window:
            yield from self.recorder.encode(batch, extracted, count)

    def _copy_teacher(self) -> None:
        assert self.config.teacher is not None
        source, target = Path(self.config.teacher.path), self.path / TEACHER
        target.mkdir(exist_ok=True)
        shutil.copyfile(source / "config.json", target / "config.json")
        copy_tokenizer_files(source, target)

    def _notes(self) -> dict[str, object]:
        assert self.config.teacher is not None
        return {"teacher": self.config.teacher.path, "data": [part.source.path for part in self.data.parts]}

    def _on_rank_0(self, action: Callable[[], T]) -> T:
        """parallel.on_rank_0, with a line on what cannot be written."""
        try:
            return on_rank_0(action)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {error.strerror or error}. Choose another cache.path."
            ) from error


def _share(ids: NDArray[np.int64], size: int, rank: int, ranks: int) -> list[NDArray[np.int64]]:
    """A data rank's microbatches, every `ranks`-th."""
    starts = range(rank * size, len(ids), ranks * size)
    return [ids[start : start + size] for start in starts]
