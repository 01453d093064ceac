"""The folder in which a data set grows until it is complete, and from which a run that was interrupted goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megakd.common.errors import UserError
from megakd.common.locks import try_lock
from megakd.data.records import IN_ORDER
from megakd.data.sources import Source

# Renamed in this order: without its index nobody takes the others for a data set.
ENDINGS = (
    ".bin", ".mask.bin", ".mask.idx", ".weight.bin", ".weight.idx", ".vocab.json.gz", ".json", ".skipped.jsonl", ".idx",
)  # fmt: skip


@dataclass
class State:
    """What is in the files so far: offsets to cut them at, whether weights are there, and what is told of them."""

    documents: int = 0
    tokens: int = 0
    has_weights: bool = False
    skipped_bytes: int = 0
    max_id: int | None = -1  # None: what was written before is not known
    longest: int = 0
    longest_place: str = ""
    dropped: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)


def partial_path(prefix: Path) -> Path:
    """The folder beside the output."""
    return prefix.parent / f".{prefix.name}.partial"


def output_paths(prefix: Path) -> list[Path]:
    """Every file that a data set may consist of."""
    return [Path(f"{prefix}{ending}") for ending in ENDINGS]


class Partial:
    """A locked folder `.NAME.partial` with the files `data.*`, job.json and a journal of the sources that are done.

    `done` sources are finished, with `state` after them. `job` is what must be equal to go on: JSON values by the
    name that messages give them. Raises UserError where another run holds the folder, where it was begun with
    another job or other files, and, without `overwrite`, where the output exists; with it everything begins anew.
    """

    def __init__(
        self, prefix: Path, job: dict[str, Any], sources: Sequence[Source], *, overwrite: bool, skips: bool
    ) -> None:
        self._prefix = prefix
        self.folder = partial_path(prefix)
        self.data = self.folder / "data"
        self._sources = [source.identity() for source in sources]
        self._journal = self.folder / "journal.jsonl"
        self._pending: list[str] = []
        self.state = State()
        self.done = 0
        self.outputs: list[str] | None = None  # endings, once everything is written
        check_outputs(prefix, overwrite)
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.folder)
        try:
            if overwrite:
                self._empty()
            self._go_on(job, skips)
        except BaseException:
            os.close(self._lock)
            raise

    @property
    def keeps(self) -> bool:
        """Whether another run could go on from here."""
        return self.done > 0

    def finish_source(self, number: int, state: State) -> None:
        """Remember, until the next `commit`, that a source is done and the files then held `state`."""
        identity = self._sources[number]
        if identity is not None:
            self._pending.append(json.dumps({"source": identity, "state": asdict(state)}))

    def commit(self, files: Sequence[Any]) -> None:
        """Make the files durable, then the journal's lines that speak of them."""
        if not self._pending:
            return
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        self._append(self._pending)
        self.done += len(self._pending)
        self._pending = []

    def complete(self, state: State) -> None:
        """Remember that every file is written; what is left are the renames."""
        outputs = [ending for ending in ENDINGS if Path(f"{self.data}{ending}").exists()]
        for ending in outputs:
            _sync(Path(f"{self.data}{ending}"))
        self._append([json.dumps({"outputs": outputs, "state": asdict(state)})])
        self.outputs = outputs

    def publish(self) -> None:
        """Give the files their names, the index last, and remove the folder."""
        assert self.outputs is not None, "complete was called"
        index = Path(f"{self._prefix}{ENDINGS[-1]}")
        index.unlink(missing_ok=True)
        _sync(self._prefix.parent)
        for ending, target in zip(ENDINGS, output_paths(self._prefix), strict=True):
            source = Path(f"{self.data}{ending}")
            if ending not in self.outputs:
                target.unlink(missing_ok=True)  # of the data set that is replaced
            elif source.exists():  # else an earlier try moved it
                os.replace(source, target)
        _sync(self._prefix.parent)
        self.remove()

    def remove(self) -> None:
        """Remove the folder with everything in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let another run have the folder."""
        os.close(self._lock)

    def _empty(self) -> None:
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()

    def _append(self, lines: Sequence[str]) -> None:
        with self._journal.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def _go_on(self, job: dict[str, Any], skips: bool) -> None:
        job_path = self.folder / "job.json"
        entries = _read_journal(self._journal)
        if not entries:
            self._empty()
            job_path.write_text(json.dumps(job), encoding="utf-8")
            _sync(job_path)
            _sync(self.folder)
            return
        begun = json.loads(job_path.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(job))
        different = [name for name in now if begun.get(name) != now[name]]
        if different:
            raise self._refusal(f"was begun with another {different[0]}")
        finished = [entry["source"] for entry in entries if "source" in entry]
        for number, source in enumerate(finished):
            if number >= len(self._sources) or self._sources[number] != source:
                raise self._refusal(f"has read {source['file']}, which is not there or not the same any more")
        last = entries[-1]
        self.outputs = last.get("outputs")
        if self.outputs is not None and len(finished) != len(self._sources):
            raise self._refusal(f"has read only {len(finished)} of the {len(self._sources)} files, and is complete")
        # A journal of before ids were kept says nothing of the ids that it has.
        self.state = State(**{"max_id": None} | last["state"])
        if not skips and set(self.state.dropped) - {problem.reason for problem in IN_ORDER}:
            raise self._refusal("was begun with --on-error skip, and has skipped lines")
        self.done = len(finished)

    def _refusal(self, what: str) -> UserError:
        return UserError(
            f"{self.folder} is from a run that was interrupted; it {what}. Repeat that run's command to go on, or use "
            "--overwrite to begin anew."
        )


def check_outputs(prefix: Path, overwrite: bool) -> None:
    """Raise UserError where the output exists, unless it may be replaced or a run was stopped while it renamed."""
    if overwrite or (_is_complete(partial_path(prefix)) and not Path(f"{prefix}.idx").exists()):
        return
    for path in output_paths(prefix):
        if path.exists():
            raise UserError(f"{path} exists. Use --overwrite to replace it, or another --output-prefix.")


def _is_complete(folder: Path) -> bool:
    entries = _read_journal(folder / "journal.jsonl")
    return bool(entries) and "outputs" in entries[-1]


def _read_journal(path: Path) -> list[dict[str, Any]]:
    """The journal's lines; one that was being written when the machine stopped is cut off."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def _lock(folder: Path) -> int:
    """Make the folder and lock it until the descriptor is closed."""
    while True:
        folder.mkdir(exist_ok=True)
        busy = f"another run is writing {folder}. Wait for it, or choose another --output-prefix."
        lock = try_lock(folder / "lock", busy)
        if lock is not None:
            return lock


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
