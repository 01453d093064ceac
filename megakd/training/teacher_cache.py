"""What a cache must be of to serve a run: the job that writes one, and the samples of a run found in one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.cache.codec import Codec
from megakd.cache.layout import canonical_json
from megakd.cache.reader import CacheReader
from megakd.cache.sampled import SampledCodec
from megakd.cache.topk import TopKCodec
from megakd.common.errors import UserError
from megakd.config.schema import Config
from megakd.data.fingerprint import read_metadata
from megakd.data.identity import file_hash
from megakd.data.indexed import MASK_ENDING
from megakd.losses.sparse_targets import BLOCK_COLUMNS
from megakd.teacher.cached import Placement, signal_mode
from megakd.training.architectures import shared_vocab_size, student_architecture, teacher_architecture
from megakd.training.train_data import DataPart, TrainData

DRAWS, LARGEST = 32, 32  # where the configuration gives no number
LOG_PROBABILITY_BITS, TAIL_SAMPLES = 8, 3
WINDOW = 8  # microbatches that go through the pipeline at a time
_BLOCK = 1 << 20
# Which tokens count: a run may count fewer than the cache, not more.
_COUNTED = ("response", "assistant", "all")


def cache_folder(config: Config) -> Path:
    """Where `cache` writes."""
    return Path(config.cache.path) if config.cache.path is not None else Path(config.run.output_dir) / "teacher_cache"


def in_whole_blocks(config: Config) -> Config:
    """The vocabulary padded such that draws are the same on every number of ranks; see losses.sparse_targets."""
    blocks = BLOCK_COLUMNS * config.parallel.tensor_model_parallel_size
    multiple = math.lcm(config.student.make_vocab_size_divisible_by, blocks)
    student = config.student.model_copy(update={"make_vocab_size_divisible_by": multiple})
    return config.model_copy(update={"student": student})


def cache_codec(config: Config) -> Codec:
    """What the records of a cache that this configuration writes are made with.

    Raises:
        UserError: k is beyond the vocabulary, or leaves no ids to draw from.
    """
    cache, vocab_size = config.cache, shared_vocab_size(config)
    if cache.mode == "sampled":
        return SampledCodec(vocab_size, cache.num_samples or DRAWS)
    k = cache.k or LARGEST
    if k > vocab_size:
        raise UserError(f"cache.k is {k}; the models share {vocab_size} ids. Use at most {vocab_size}.")
    tail_samples = cache.tail_samples
    if tail_samples is None:
        tail_samples = TAIL_SAMPLES if k < vocab_size else 0
    if tail_samples and k == vocab_size:
        raise UserError(
            f"cache.tail_samples is {tail_samples} and cache.k is all {k} ids; nothing is left to draw from. Leave "
            "cache.tail_samples out."
        )
    return TopKCodec(vocab_size, k, cache.log_probability_bits or LOG_PROBABILITY_BITS, tail_samples)


def teacher_temperature(config: Config) -> float:
    """What the teacher's logits are divided by."""
    distill = config.distill
    return distill.temperature if distill.teacher_temperature is None else distill.teacher_temperature


def cache_job(config: Config, data: TrainData, stored: NDArray[np.int64]) -> dict[str, Any]:
    """What decides the contents of the cache that a configuration writes; see cache.manifest.Manifest.

    Args:
        stored: ids of the samples that are written.
    """
    assert config.teacher is not None
    codec = cache_codec(config)
    return {
        "codec": codec.settings(),
        "temperature": teacher_temperature(config),
        **({"seed": config.run.seed} if signal_mode(codec) == "sampled" else {}),
        "sequence_length": config.data.sequence_length,
        "samples": {
            "scope": config.cache.scope,
            "count": len(stored),
            "ids": hashlib.blake2b(stored.astype("<i8").tobytes(), digest_size=16).hexdigest(),
        },
        "teacher": {
            "dtype": config.teacher.dtype or config.run.dtype,
            "architecture": teacher_architecture(config).model_dump(),
            "files": model_hash(Path(config.teacher.path)),
        },
        "data": [
            {**describe_part(config, part), "first_sample": data.samples.first_id(number)}
            for number, part in enumerate(data.parts)
        ],
    }


def samples_to_store(config: Config, data: TrainData, steps: int) -> NDArray[np.int64]:
    """Ids of the training samples, ascending: all, or those of the run's steps."""
    if config.cache.scope == "run":
        return np.unique(data.order.sample_ids(0, steps * config.data.global_batch_size))
    return np.concatenate([np.arange(share.ids.start, share.ids.stop, dtype=np.int64) for share in data.order.shares])


def describe_part(config: Config, part: DataPart) -> dict[str, Any]:
    """What makes the samples of a data set what they are: its files, and how they are cut."""
    data, prefix = config.data, part.source.path
    metadata = read_metadata(prefix)
    description: dict[str, Any] = {
        "kind": "examples" if part.of_examples else "text",
        "files": file_hash(f"{prefix}.idx", f"{prefix}.bin"),
        "tokenizer": None if metadata is None else _hash_of(metadata["tokenizer"]),
        "samples": part.samples.num_samples,
        "sequence_length": data.sequence_length,
    }
    if not part.of_examples:
        return description | {
            "reset_position_ids": data.reset_position_ids,
            "reset_attention_mask": data.reset_attention_mask,
            "eod_mask_loss": data.eod_mask_loss,
        }
    return description | {
        "mask": file_hash(f"{prefix}{MASK_ENDING}.idx", f"{prefix}{MASK_ENDING}.bin"),
        "loss_on": data.loss_on,
        "truncation": data.truncation,
        "packing": data.packing,
        "valid_fraction": data.valid_fraction,
        "test_fraction": data.test_fraction,
    }


def check_cache_fits(config: Config, reader: CacheReader, data: TrainData, steps: int) -> None:
    """Hold a cache against the run that is to learn from it.

    Raises:
        UserError: another temperature, vocabulary or data set than the run's, or a sample that its steps visit is not
            there.
    """
    job, folder = reader.manifest.job, reader.folder
    wanted = teacher_temperature(config)
    if job["temperature"] != wanted:
        key = "temperature" if config.distill.teacher_temperature is None else "teacher_temperature"
        raise UserError(
            f"distill.{key} is {wanted:g}; {folder} has the teacher at temperature {job['temperature']:g} and no other "
            f"can be had from it. Set distill.{key} to {job['temperature']:g}, or write another cache."
        )
    vocab_size, known = reader.manifest.codec.settings()["vocab_size"], student_architecture(config).vocab_size
    if known < vocab_size:
        raise UserError(
            f"{folder} is of {vocab_size} ids and the student knows {known}. Write a cache with this student in the "
            "configuration."
        )
    placements = place_samples(config, reader, data)
    missing = _first_missing(reader, placements, _all_ids(data))
    if missing is not None and job["samples"]["scope"] == "run":
        total = steps * config.data.global_batch_size
        visited = (data.order.sample_ids(at, min(_BLOCK, total - at)) for at in range(0, total, _BLOCK))
        missing = _first_missing(reader, placements, visited)
    if missing is not None:
        raise UserError(
            f"{folder} lacks sample {missing}, which this run visits; it has {len(reader):,} samples "
            f"(cache.scope {job['samples']['scope']}). Write a cache with this run's split, seed and length, or with "
            "cache.scope dataset."
        )


def _all_ids(data: TrainData) -> Iterator[NDArray[np.int64]]:
    for share in data.order.shares:
        for start in range(share.ids.start, share.ids.stop, _BLOCK):
            yield np.arange(start, min(start + _BLOCK, share.ids.stop), dtype=np.int64)


def _first_missing(reader: CacheReader, placements: list[Placement], blocks: Iterator[NDArray[np.int64]]) -> int | None:
    """The first sample of these blocks of the run's ids that a cache lacks, by its id there."""
    for ids in blocks:
        for placement in placements:
            mine = ids[(ids >= placement.ids.start) & (ids < placement.ids.stop)]
            cached = mine - placement.ids.start + placement.first_cached
            missing = cached[~reader.contains(cached)]
            if len(missing):
                return int(missing[0])
    return None


def place_samples(config: Config, reader: CacheReader, data: TrainData) -> list[Placement]:
    """Where each data set's samples are in a cache.

    Raises:
        UserError: it is of other data, or of samples cut in another way.
    """
    places = []
    for number, part in enumerate(data.parts):
        wanted = describe_part(config, part)
        problems = [_difference(wanted, cached) for cached in reader.manifest.job["data"]]
        if None not in problems:
            # The nearest to what is wanted tells most.
            problem = min((p for p in problems if p is not None), key=lambda p: -_ORDER.index(p[0]))
            raise UserError(_told(problem, part, reader, len(problems)))
        cached = reader.manifest.job["data"][problems.index(None)]
        first = data.samples.first_id(number)
        places.append(Placement(range(first, first + part.samples.num_samples), cached["first_sample"]))
    return places


# What is compared first says most about which data set is meant.
_ORDER = (
    "kind", "tokenizer", "files", "mask", "sequence_length", "reset_position_ids", "reset_attention_mask",
    "truncation", "packing", "valid_fraction", "test_fraction", "loss_on", "eod_mask_loss", "samples",
)  # fmt: skip


def _difference(wanted: dict[str, Any], cached: dict[str, Any]) -> tuple[str, Any, Any] | None:
    for key in _ORDER:
        a, b = wanted.get(key), cached.get(key)
        if a == b or (key == "tokenizer" and None in (a, b)):
            continue
        if key == "loss_on" and wanted["truncation"] == "drop" and _COUNTED.index(a) < _COUNTED.index(b):
            continue
        if key == "eod_mask_loss" and a:
            continue
        return key, a, b
    return None


def _told(problem: tuple[str, Any, Any], part: DataPart, reader: CacheReader, data_sets: int) -> str:
    key, wanted, cached = problem
    prefix, folder = part.source.path, reader.folder
    if key == "mask":
        teacher = reader.manifest.notes.get("teacher", "TEACHER")
        return (
            f"data.train: {prefix} has the tokens that {folder} was written from and another mask of which of them "
            "count: the data was written again with other mask rules or flags, so positions that this run needs are "
            "not those in the cache. Write it again: ./launch.sh cache CONFIG teacher.source=online "
            f"teacher.path={teacher} cache.path={folder} --overwrite"
        )
    if key in ("kind", "files", "samples"):
        told = "of another data set" if data_sets == 1 else f"of {data_sets} other data sets"
        names = ", ".join(str(name) for name in reader.manifest.notes.get("data", ())) or "unknown"
        return f"data.train: {folder} is {told} than {prefix} (written from {names}). Write a cache of this data."
    if key == "tokenizer":
        return (
            f"data.train: the tokenizer of {prefix} is another than that of the data that {folder} was written from. "
            "Write a cache of this data."
        )
    return (
        f"data.{key} is {_shown(wanted)}; {folder} was written with {_shown(cached)}, so its samples are others. "
        f"Set data.{key} to {_shown(cached)}, or write another cache."
    )


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _hash_of(tokenizer: dict[str, Any]) -> str:
    identity = {key: value for key, value in tokenizer.items() if key != "path"}
    return hashlib.blake2b(canonical_json(identity), digest_size=16).hexdigest()


def model_hash(folder: Path) -> str:
    """A hash of a model's weight files: names, sizes and blocks of each; see data.identity.file_hash."""
    found = sorted(
        path for pattern in ("*.safetensors", "*.distcp", "*/*.distcp", "common.pt", "*/common.pt")
        for path in folder.glob(pattern)
    )  # fmt: skip
    return file_hash(*found)
