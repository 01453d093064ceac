"""How a student and a teacher on ranks of its own keep step: who may go how far.

Told through the launcher's store, which both sides have before any GPUs can talk, and where waiting costs no GPU
anything; the first rank of each side speaks for it.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import IntEnum

import torch
import torch.distributed as dist

from megakd.common.stop_request import stop_requested

# How often a teacher that waits tells its ranks so: none of them is to be inside communication for long.
_SLICE_SECONDS = 1.0
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.02
_END = "end"


@dataclass(frozen=True)
class Task:
    """What a student asks its teacher for.

    Attributes:
        first_step, steps: the training steps, counted from 0, and where they end.
        evaluates_only: one evaluation and no steps.
    """

    first_step: int
    steps: int
    evaluates_only: bool = False


@dataclass(frozen=True)
class TeacherTimes:
    """Seconds from the end of a step's work to that of the next, and how many of them the teacher waited."""

    seconds: float
    waited: float


class StudentTurns:
    """The student's side, on its rank 0 alone."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._begun = 0

    def start(self, task: Task) -> None:
        """Tell the teacher what there is to do."""
        self._store.set("task", json.dumps(asdict(task)))

    def begin(self, label: str) -> None:
        """Say that the next window begins; `label` is one that only the same window of the teacher's has."""
        self._store.set(f"begun {self._begun}", label)
        self._begun += 1

    def end(self) -> None:
        """Say that there is nothing more to do, and wait until every rank of the teacher has taken note."""
        self._store.set("ended", "")
        self._store.set(f"begun {self._begun}", _END)
        _take(self._store, "noted")

    def stop_wish(self) -> str | None:
        """What a rank of the teacher's was told to stop for."""
        return self._store.get("stop").decode() if self._store.check(["stop"]) else None

    def teacher_times(self, step: int) -> TeacherTimes:
        """Of a step whose signals have come, counted from 0."""
        return TeacherTimes(**json.loads(_take(self._store, f"times {step}")))


class _Answer(IntEnum):
    WAIT, COMPUTE, STOP = range(3)


class TeacherTurns:
    """The teacher's side. All methods are collective over its world.

    Args:
        lookahead: windows that may be computed before the student begins with them.
        device: where the world's tensors are.
    """

    def __init__(self, store: dist.Store, lookahead: int, device: torch.device) -> None:
        self._store, self._lookahead, self._device = store, lookahead, device
        self._labels: deque[str] = deque()  # of windows that the student is not known to have begun, in order
        self._count = 0
        self._waited = 0.0
        self._since = time.monotonic()

    def task(self) -> Task:
        """Wait for what there is to do."""
        self._agree(lambda: _Answer.COMPUTE if self._comes("task") else _Answer.WAIT)
        return Task(**json.loads(self._store.get("task")))

    def may_compute(self, label: str) -> bool:
        """Wait until the next window may be computed; False where the student has ended.

        Raises:
            RuntimeError: the student's window has another label: the two sides have lost each other.
        """
        number, self._count = self._count - self._lookahead, self._count + 1
        self._labels.append(label)
        return self._agree(lambda: self._ask(number)) is _Answer.COMPUTE

    def step_done(self, step: int) -> None:
        """Tell the student how the time of a step went, counted from 0."""
        now = time.monotonic()
        if dist.get_rank() == 0:
            times = TeacherTimes(now - self._since, self._waited)
            self._store.set(f"times {step}", json.dumps(asdict(times)))
        self._since, self._waited = now, 0.0

    def leave(self) -> None:
        """Wait until the student has ended, and tell it that this rank goes."""
        self._agree(lambda: _Answer.STOP if self._comes("ended") else _Answer.WAIT)
        if self._store.add("left", 1) == dist.get_world_size():
            self._store.set("noted", "")

    def _ask(self, number: int) -> _Answer:
        """Whether the student has begun window `number`, as far as can be known soon."""
        if self._store.check(["ended"]):
            return _Answer.STOP
        if number < 0:
            return _Answer.COMPUTE
        if not self._comes(f"begun {number}"):
            return _Answer.WAIT
        begun = _take(self._store, f"begun {number}").decode()
        if begun == _END:
            return _Answer.STOP
        expected = self._labels.popleft()
        if begun != expected:
            raise RuntimeError(f"the student's window {number} is {begun!r} and the teacher's is {expected!r}")
        return _Answer.COMPUTE

    def _agree(self, ask: Callable[[], _Answer]) -> _Answer:
        """The first rank asks until it has an answer, which all get."""
        start = time.monotonic()
        answer = torch.full((1,), _Answer.WAIT, dtype=torch.int32, device=self._device)
        while answer.item() == _Answer.WAIT:
            if (wish := stop_requested()) is not None:
                self._store.set("stop", wish)
            if dist.get_rank() == 0:
                answer.fill_(ask())
            dist.broadcast(answer, src=0)
        self._waited += time.monotonic() - start
        return _Answer(int(answer.item()))

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
