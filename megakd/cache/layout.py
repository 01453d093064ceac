"""The structures that a cache's binary files are made of; docs/teacher_cache.md describes them."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

VERSION = 1
SHARD_MAGIC = b"MKDSHARD"
INDEX_MAGIC = b"MKDINDEX"
END_MAGIC = b"MKDSHEND"

# magic, version, nothing, job id, samples (index only), crc32 of the content (index only), crc32 of the header before
HEADER = struct.Struct("<8sII16sQ16xII")
# entries, where their table begins, its crc32, crc32 of the footer before, magic
FOOTER = struct.Struct("<QQII8s")

ENTRY = np.dtype(
    [
        ("sample_id", "<u8"),
        ("offset", "<u8"),
        ("token_hash", "<u8"),
        ("length", "<u4"),
        ("rows", "<u4"),
        ("crc32", "<u4"),
        ("unused", "<u4"),
    ]
)
# The index has the same in columns, one after another.
COLUMNS = (
    ("sample_id", "<u8"),
    ("offset", "<u8"),
    ("token_hash", "<u8"),
    ("length", "<u4"),
    ("rows", "<u4"),
    ("crc32", "<u4"),
    ("shard", "<u4"),
)
INDEX_ENTRY_BYTES = sum(np.dtype(kind).itemsize for _, kind in COLUMNS)


class Damage(ValueError):
    """A file's bytes are not what they must be; the message says what, for a sentence that begins with the file."""


def job_id(job: Mapping[str, Any]) -> bytes:
    """16 bytes that name a job."""
    return hashlib.blake2b(canonical_json(job), digest_size=16).digest()


def canonical_json(value: Any) -> bytes:
    """The one way to write a JSON value that checksums are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def pack_header(magic: bytes, job: bytes, samples: int = 0, content_crc32: int = 0) -> bytes:
    """A file's first bytes."""
    head = HEADER.pack(magic, VERSION, 0, job, samples, content_crc32, 0)[:-4]
    return head + zlib.crc32(head).to_bytes(4, "little")


def read_header(data: bytes, magic: bytes) -> tuple[bytes, int, int]:
    """(job id, samples, crc32 of the content) of a header; raises Damage."""
    if len(data) < HEADER.size:
        raise Damage(f"is cut short at {len(data)} bytes")
    found, version, _, job, samples, content, crc = HEADER.unpack(data[: HEADER.size])
    if found != magic:
        raise Damage("is not a file of a teacher cache")
    if crc != zlib.crc32(data[: HEADER.size - 4]):
        raise Damage("is damaged in its header")
    if version != VERSION:
        raise Damage(f"has format version {version}; this version of megakd reads {VERSION}")
    return job, samples, content
