"""What differs between a run and the one that wrote its checkpoint, and whether it changes the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from megakd.cache.layout import job_id
from megakd.cache.reader import CacheReader
from megakd.checkpoint.record import Record
from megakd.common.errors import UserError
from megakd.common.logging import log
from megakd.config.layouts import TEACHER_PLACING
from megakd.config.problems import show
from megakd.config.schema import Config
from megakd.data.examples import has_weights
from megakd.data.identity import file_hash
from megakd.data.indexed import WEIGHT_ENDING
from megakd.training.teacher_cache import describe_part, model_hash
from megakd.training.train_data import TrainData

# These say where a run's files go, what is told of it, how it is laid out and for how long it goes on: each step's
# result stays what it was, but for the rounding of another layout.
_HARMLESS = (
    "run.name",
    "run.output_dir",
    "run.export",
    "run.time_limit_minutes",
    "run.layer_spec",
    "student.recompute_granularity",
    *(f"teacher.{key}" for key in TEACHER_PLACING),
    "cache",
    "parallel",
    "distill.loss_chunk_mib",
    "data.micro_batch_size",
    "data.valid",
    "data.test",
    "optimizer.overlap_grad_reduce",
    "optimizer.overlap_param_gather",
    "checkpoint",
    "safeguards",
    "logging",
    "evaluation",
)
_LENGTH = ("schedule.train_steps", "schedule.train_tokens", "schedule.train_epochs")
_ABSENT = object()
TEACHER_CONTENTS = "the contents of teacher.path"


@dataclass(frozen=True)
class Change:
    """A setting, or the contents of files that it names, then and now."""

    key: str
    before: object
    now: object
    alters: bool

    def __str__(self) -> str:
        return f"{self.key} was {show(self.before)} and is {show(self.now)}"


def describe_contents(config: Config, data: TrainData) -> dict[str, str]:
    """Hashes of the files that decide what is learnt, by what names them; see data.identity.file_hash."""
    contents = {}
    for part in data.parts:
        prefix, description = part.source.path, describe_part(config, part)
        found = description["files"] + description.get("mask", "")
        if part.of_examples and has_weights(prefix, "data.train"):
            # No part of what makes samples: a teacher says the same of them, whatever they weigh.
            found += file_hash(f"{prefix}{WEIGHT_ENDING}.idx", f"{prefix}{WEIGHT_ENDING}.bin")
        contents[f"the contents of data.train {prefix}"] = found
    if config.teacher is not None:
        path = Path(config.teacher.path)
        if config.teacher.source == "online":
            contents[TEACHER_CONTENTS] = file_hash(path / "config.json") + model_hash(path)
        else:
            contents[TEACHER_CONTENTS] = job_id(CacheReader(path).manifest.job).hex()
    return contents


def find_changes(record: Record, config: Config, contents: Mapping[str, str] | None = None) -> list[Change]:
    """What differs from the run that wrote `record`, what alters the result first; settings alone without `contents`.

    A setting that the record does not have, being newer, counts as left at its default.
    """
    constant = config.schedule.lr_decay_style == "constant" == record.config["schedule"]["lr_decay_style"]
    changes = []
    for key, before, now in _differences(record.config, config.model_dump(), _defaults(config), ""):
        harmless = any(key == name or key.startswith(f"{name}.") for name in _HARMLESS)
        changes.append(Change(key, before, now, not (harmless or (constant and key in _LENGTH))))
    # A blend's lists are compared as they stand; of files under other names the names alone are told.
    for key, found in (contents or {}).items():
        earlier = record.contents.get(key)
        if earlier is not None and earlier != found:
            changes.append(Change(key, earlier[:12], found[:12], alters=True))
    return sorted(changes, key=lambda change: not change.alters)


def check_changes(path: Path, changes: list[Change], *, accepted: bool) -> None:
    """Log the changes; those that alter the result must be accepted.

    Raises:
        UserError: they are not.
    """
    altering = [change for change in changes if change.alters]
    if altering and not accepted:
        raise UserError(
            f"{path} was written by a run with other settings, and these change the result: "
            f"{'; '.join(map(str, altering))}. Set them back, confirm with --accept-changes, or give another "
            "run.output_dir."
        )
    for change in changes:
        log.info(f"since {path.name}: {change}{', as accepted' if change.alters else ''}")


def _differences(before: Any, now: Any, defaults: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """(key, before, now) of all leaves that differ, and of sections that one of both does not have."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name, value in now.items():
            default = defaults.get(name, _ABSENT) if isinstance(defaults, Mapping) else _ABSENT
            earlier = before.get(name, default)
            if earlier is not _ABSENT:
                yield from _differences(earlier, value, default, f"{key}.{name}" if key else name)
    elif before != now:
        yield key, before, now


def _defaults(config: Config) -> dict[str, Any]:
    """Every section's keys that may be left out, with the values they have then."""
    return {
        section: {
            name: _plain(field.get_default(call_default_factory=True))
            for name, field in type(getattr(config, section)).model_fields.items()
            if not field.is_required()
        }
        for section in type(config).model_fields
        if getattr(config, section) is not None
    }


def _plain(default: Any) -> Any:
    """A section as the mapping that a record has of it."""
    return default.model_dump() if isinstance(default, BaseModel) else default
