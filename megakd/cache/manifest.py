"""The manifest: what a cache is of, what it consists of; it is written last, so where it is the cache is complete."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megakd._version import __version__
from megakd.cache.codec import Codec, build_codec
from megakd.cache.layout import VERSION, Damage, canonical_json, job_id
from megakd.common.durable import write_durably
from megakd.common.errors import UserError

MANIFEST = "manifest.json"
FORMAT = "megakd-teacher-cache"
REMEDY = "Write the cache again."


@dataclass(frozen=True)
class ShardFile:
    """A shard as it must be found."""

    name: str
    bytes: int
    samples: int
    table_crc32: int


@dataclass(frozen=True)
class Manifest:
    """What a cache is of (`job`), how much it holds and of which files.

    Attributes:
        job: JSON values that decide the contents: "codec" (its settings), "sequence_length", and what megakd.training
            adds of the teacher, the data and the draws. Equal jobs make equal records.
        notes: JSON values for the reader: where teacher and data lay.
        samples, rows: records, and positions stored in them.
        bytes: of all shards and the index.
    """

    job: Mapping[str, Any]
    notes: Mapping[str, Any]
    samples: int
    rows: int
    bytes: int
    shards: tuple[ShardFile, ...]

    @property
    def codec(self) -> Codec:
        """What decodes the records."""
        return build_codec(self.job["codec"])

    @property
    def sequence_length(self) -> int:
        """Positions of a sample."""
        length: int = self.job["sequence_length"]
        return length

    @property
    def bytes_per_row(self) -> float:
        """Bytes per stored position, with everything around the records."""
        return self.bytes / max(self.rows, 1)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`; raises OSError."""
    values = {
        "format": FORMAT,
        "version": VERSION,
        "megakd": __version__,
        "job_id": job_id(manifest.job).hex(),
        **{field.name: getattr(manifest, field.name) for field in fields(manifest)},
        "shards": [asdict(shard) for shard in manifest.shards],
    }
    values["checksum"] = _checksum(values)
    write_durably(folder / MANIFEST, json.dumps(values, indent=2).encode("ascii"))


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        UserError: there is none, or it is damaged or of another version.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        if not folder.is_dir():
            raise UserError(f"{folder} does not exist; give the folder of a teacher cache.") from error
        begun = " It was begun and is not complete: the command that wrote it goes on." if _begun(folder) else ""
        raise UserError(f"{folder} is no teacher cache: {MANIFEST} does not exist.{begun}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}). {REMEDY}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Give the folder of a teacher cache.") from error
    try:
        return _from_values(values)
    except Damage as error:
        raise UserError(f"{path} {error}. {REMEDY}") from error


def _from_values(values: Any) -> Manifest:
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise Damage("is not the manifest of a teacher cache")
    if values.get("version") != VERSION:
        raise Damage(f"has format version {values.get('version')}; this version of megakd reads {VERSION}")
    rest = {key: value for key, value in values.items() if key != "checksum"}
    try:
        damaged = values.get("checksum") != _checksum(rest)
    except ValueError:
        damaged = True
    if damaged:
        raise Damage("is damaged: its checksum is of other contents")
    names = [field.name for field in fields(Manifest)]
    shards = tuple(ShardFile(**shard) for shard in values["shards"])
    return Manifest(**{**{name: values[name] for name in names}, "shards": shards})


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.blake2b(canonical_json(values), digest_size=16).hexdigest()


def _begun(folder: Path) -> bool:
    return (folder / "job.json").is_file()
