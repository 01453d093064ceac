"""What a person wants to know of a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megakd.cache.folder import TEACHER
from megakd.cache.reader import CacheReader
from megakd.common.errors import UserError

_SHOWN_IDS = 8


def describe_cache(reader: CacheReader) -> Iterator[str]:
    """The manifest in lines."""
    manifest = reader.manifest
    job = manifest.job
    yield f"{reader.folder}: teacher cache"
    yield "  " + ", ".join(f"{key} {value}" for key, value in manifest.codec.settings().items())
    yield "  " + ", ".join(f"{key} {job[key]}" for key in ("temperature", "seed", "sequence_length") if key in job)
    scope = job.get("samples", {}).get("scope", "unknown scope")
    yield f"  {manifest.samples:,} samples ({scope}), {manifest.rows:,} tokens"
    yield f"  {manifest.bytes:,} bytes in {len(manifest.shards)} shards, {manifest.bytes_per_row:.2f} per token"
    teacher: dict[str, Any] = job.get("teacher", {})
    yield f"  teacher {manifest.notes.get('teacher')} ({teacher.get('dtype')}), files {teacher.get('files')}"
    for path, part in zip(manifest.notes.get("data", []), job.get("data", []), strict=False):
        cut = {key: value for key, value in part.items() if key not in ("files", "mask", "tokenizer", "first_sample")}
        yield f"  data {path}: " + ", ".join(f"{key} {value}" for key, value in cut.items())


def describe_sample(reader: CacheReader, sample_id: int | None, positions: int) -> Iterator[str]:
    """The first rows of a sample, likeliest ids first, as pieces of text where the tokenizer can be read."""
    if not len(reader):
        return
    number = int(reader.sample_ids[0]) if sample_id is None else sample_id
    sample = reader.read(number)
    yield f"sample {number}: {int(sample.stored.sum())} of {len(sample.stored)} positions stored"
    shown = _pieces(reader.folder / TEACHER)
    rows = sample.rows
    for row, position in enumerate(np.flatnonzero(sample.stored)[:positions].tolist()):
        order = np.argsort(-rows.probabilities[row], kind="stable")[:_SHOWN_IDS]
        found = [
            f"{shown(int(rows.ids[row, i]))} {rows.probabilities[row, i]:.4f}" for i in order if rows.ids[row, i] >= 0
        ]
        beside = (
            f"entropy {rows.entropy[row]:.3f}"
            if rows.entropy is not None
            else f"rest {1 - rows.probabilities[row].sum():.4f}"
        )
        yield f"  position {position}: {', '.join(found)}; {beside}"


def _pieces(folder: Path) -> Callable[[int], str]:
    from megakd.data.tokenizer import has_tokenizer, load_tokenizer

    if not has_tokenizer(folder):
        return str
    try:
        tokenizer = load_tokenizer(folder)
    except UserError:
        return str
    return lambda index: repr(tokenizer.decode([index]))
