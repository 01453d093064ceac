"""How a student and a teacher on ranks of its own keep step: who may go how far.

Told through the launcher's store, which both sides have before any GPUs can talk, and where waiting costs no GPU
anything; the first rank of each side speaks for it.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import IntEnum

import torch
import torch.distributed as dist

from megakd.common.stop_request import stop_requested

# How often a teacher that waits tells its ranks so: none of them is to be inside communication for long.
_SLICE_SECONDS = 1.0
_SIGN_SECONDS = 0.5
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.02
_END = "end"


@dataclass(frozen=True)
class Task:
    """What a student asks its teacher for.

    Attributes:
        first_step, steps: the training steps, counted from 0, and where they end.
        evaluates_only: one evaluation and no steps.
        is_checked: between steps the student measures the teacher by itself, too.
    """

    first_step: int
    steps: int
    evaluates_only: bool = False
    is_checked: bool = False


@dataclass(frozen=True)
class TeacherTimes:
    """Seconds from the end of a step's work to that of the next, and how many of them the teacher waited."""

    seconds: float
    waited: float


class StudentTurns:
    """The student's side, on its rank 0 alone. A thread of its own gives signs of life as long as the process runs."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._begun = 0
        self._ended = threading.Event()
        threading.Thread(target=self._live, name="megakd-signs-of-life", daemon=True).start()

    def start(self, task: Task) -> None:
        """Tell the teacher what there is to do."""
        self._store.set("task", json.dumps(asdict(task)))

    def begin(self, label: str) -> None:
        """Say that the next window begins; by `label` the teacher sees that it means the same one."""
        self._store.set(f"begun {self._begun}", label)
        self._begun += 1

    def end(self) -> None:
        """Say that there is nothing more to do, and wait until every rank of the teacher has taken note."""
        self._store.set("ended", "")
        self._store.set(f"begun {self._begun}", _END)
        _take(self._store, "noted")
        self._ended.set()

    def stop_wish(self) -> str | None:
        """What a rank of the teacher's was told to stop for."""
        return self._store.get("stop").decode() if self._store.check(["stop"]) else None

    def teacher_times(self, step: int) -> TeacherTimes:
        """Of a step whose signals have come, counted from 0."""
        return TeacherTimes(**json.loads(_take(self._store, f"times {step}")))

    def _live(self) -> None:
        store = self._store.clone()  # type: ignore[attr-defined]  # not in torch's stubs; the other one waits at times
        with suppress(dist.DistError):  # the job is over, and the store with it
            while not self._ended.wait(_SIGN_SECONDS):
                store.add("signs of life", 1)


class _Answer(IntEnum):
    WAIT, SILENT, COMPUTE, STOP = range(4)


class TeacherTurns:
    """The teacher's side. All methods are collective over its world.

    Args:
        ahead: samples of windows that the student has not begun, which may be computed all the same.
        device: where the world's tensors are.
        beat: called while the student gives signs of life and this side waits for it.
    """

    def __init__(
        self, store: dist.Store, ahead: int, device: torch.device, beat: Callable[[], None] = lambda: None
    ) -> None:
        self._store, self._ahead, self._device, self._beat = store, ahead, device, beat
        # Of windows that the student is not known to have begun, in order: label and samples.
        self._open: deque[tuple[str, int]] = deque()
        self._signs = 0
        self._waited = 0.0
        self._since = time.monotonic()
        self.begun = 0

    def task(self) -> Task:
        """Wait for what there is to do."""
        self._agree(lambda: _Answer.COMPUTE if self._comes("task") else self._wait())
        return Task(**json.loads(self._store.get("task")))

    def may_compute(self, label: str, samples: int) -> bool:
        """Wait until the next window may be computed; False where the student has ended.

        Afterwards `begun` says how many windows the student has begun at least.

        Raises:
            RuntimeError: the student's window has another label: the two sides have lost each other.
        """
        self._open.append((label, samples))
        return self._agree(self._ask) is _Answer.COMPUTE

    def step_done(self, step: int) -> None:
        """Tell the student how the time of a step went, counted from 0."""
        now = time.monotonic()
        if dist.get_rank() == 0:
            times = TeacherTimes(now - self._since, self._waited)
            self._store.set(f"times {step}", json.dumps(asdict(times)))
        self._since, self._waited = now, 0.0

    def leave(self) -> None:
        """Wait until the student has ended, and tell it that this rank goes."""
        self._agree(lambda: _Answer.STOP if self._comes("ended") else self._wait())
        if self._store.add("left", 1) == dist.get_world_size():
            self._store.set("noted", "")

    def _ask(self) -> _Answer:
        """Whether the student is near enough to the last window that was asked for, as far as can be known soon."""
        if self._store.check(["ended"]):
            return _Answer.STOP
        while self._open and sum(samples for _, samples in self._open) > self._ahead:
            if not self._comes(f"begun {self.begun}"):
                return self._wait()
            begun = _take(self._store, f"begun {self.begun}").decode()
            if begun == _END:
                return _Answer.STOP
            expected, _ = self._open.popleft()
            if begun != expected:
                raise RuntimeError(f"the student's window {self.begun} is {begun!r} and the teacher's is {expected!r}")
            self.begun += 1
        return _Answer.COMPUTE

    def _agree(self, ask: Callable[[], _Answer]) -> _Answer:
        """The first rank asks until it has an answer, which all get."""
        start, answer = time.monotonic(), _Answer.WAIT
        told = torch.empty(2, dtype=torch.int64, device=self._device)
        while answer in (_Answer.WAIT, _Answer.SILENT):
            if (wish := stop_requested()) is not None:
                self._store.set("stop", wish)
            if dist.get_rank() == 0:
                told.copy_(torch.tensor([ask(), self.begun]))
            dist.broadcast(told, src=0)
            answer, self.begun = _Answer(int(told[0])), int(told[1])
            if answer is _Answer.WAIT:
                self._beat()
        self._waited += time.monotonic() - start
        return answer

    def _wait(self) -> _Answer:
        """Whether the student lives, which is what it has done since this was last asked."""
        before, self._signs = self._signs, int(self._store.add("signs of life", 0))
        return _Answer.WAIT if self._signs > before else _Answer.SILENT

    def _comes(self, key: str) -> bool:
        """Whether a key comes soon; asked for again and again, since the store's own wait would warn of its end."""
        deadline, pause = time.monotonic() + _SLICE_SECONDS, _SHORTEST_PAUSE
        while not self._store.check([key]):
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE)
        return True


def _take(store: dist.Store, key: str) -> bytes:
    """Wait for a value that nobody else reads, and remove it."""
    value = bytes(store.get(key))
    store.delete_key(key)
    return value
