"""record.json of a checkpoint: which run it is of, and the run's numbers at its step."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megakd._version import __version__
from megakd.checkpoint.checksums import Damage, file_digest, read_checksums
from megakd.checkpoint.folders import checkpoint_steps
from megakd.common.durable import write_durably
from megakd.common.errors import UserError

RECORD = "record.json"
FORMAT, VERSION = "megakd-checkpoint", 1


@dataclass(frozen=True)
class Record:
    """What a checkpoint says of its run, JSON values all.

    Attributes:
        step: optimizer steps done.
        counters: the loop's other numbers.
        config: the resolved configuration.
        contents: hashes of the files that the configuration names, by key.
        layout: ranks and how the model lies on them; random states fit the same layout alone.
    """

    step: int
    counters: dict[str, Any]
    config: dict[str, Any]
    contents: dict[str, str]
    layout: str


def write_record(folder: Path, record: Record) -> None:
    """Write `record.json`; raises OSError."""
    values = {"format": FORMAT, "version": VERSION, "megakd": __version__, **asdict(record)}
    write_durably(folder / RECORD, json.dumps(values, indent=1).encode("ascii"))


def read_record(folder: Path) -> Record:
    """What a checkpoint says of its run.

    Raises:
        UserError: it is not of this version's format, or cannot be read.
    """
    path = folder / RECORD
    try:
        values = json.loads(path.read_bytes())
        found = (values["format"], values["version"])
        if found == (FORMAT, VERSION):
            return Record(*(values[name] for name in Record.__dataclass_fields__))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}). Remove {folder}.") from error
    raise UserError(
        f"{folder} is a checkpoint of format {found[0]} version {found[1]}; this version of megakd reads {FORMAT} "
        f"version {VERSION}. Resume with the megakd that wrote it ({values.get('megakd', 'unknown')}), set "
        "checkpoint.resume=false to start over, or give another run.output_dir."
    )


def newest_record(folder: Path) -> tuple[Path, Record] | None:
    """What the newest checkpoint under `folder` with an undamaged record says of its run; other files are not read.

    None where there is none: who resumes tells what is wrong.
    """
    for path in reversed(checkpoint_steps(folder).values()):
        try:
            if read_checksums(path).get(RECORD) == file_digest(path / RECORD):
                return path, read_record(path)
        except (UserError, Damage, OSError):
            continue
    return None
