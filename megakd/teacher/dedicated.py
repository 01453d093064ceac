"""A teacher on ranks of its own: what it does there, and what the student's ranks have in its place."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megakd.data.batches import Batch
from megakd.losses import DenseSignal
from megakd.parallel.bridge import Bridge
from megakd.parallel.mesh import ModelMesh
from megakd.parallel.pieces import Window
from megakd.teacher.online import as_signals, window_of
from megakd.teacher.stage import TeacherStage
from megakd.teacher.turns import StudentTurns, TeacherTurns


class RemoteTeacher:
    """On the student's ranks: receives hidden states, straight from the ranks that have them.

    Args:
        head: [v/tp, h_t] the teacher's output layer in the student's vocabulary partition, on the student's last
            stage; None on the others.
        mesh: the student's.
        bridge: in ranks of the job.
        group: joins the ranks of both sides; see platform.worlds.Joint.
        turns: on the student's rank 0.
    """

    def __init__(
        self, head: Tensor | None, mesh: ModelMesh, bridge: Bridge, group: Any, turns: StudentTurns | None
    ) -> None:
        self.head = head
        self.turns = turns
        self._mesh, self._bridge, self._group = mesh, bridge, group

    @torch.no_grad()
    def signals(self, microbatches: Sequence[Batch]) -> Sequence[DenseSignal | None]:
        """See Teacher.signals; the teacher's ranks go through the same windows in the same order."""
        window = window_of(microbatches, self._mesh.dp_size)
        if self.turns is not None:
            self.turns.begin(window_label(microbatches, window))
        received = self._bridge.buffers(window)
        coming = [self._group.recv([buffer], rank, 0) for rank, buffer in received.items()]
        for work in coming:
            work.wait()
        return as_signals(self._bridge.unpack(received, window), self.head, len(microbatches), is_spread=True)


class TeacherServer:
    """On the teacher's ranks: computes windows ahead of the student and sends them. Methods are collective over them.

    Args:
        bridge: in ranks of the job.
        group: joins the ranks of both sides.
    """

    def __init__(self, stage: TeacherStage, bridge: Bridge, group: Any, turns: TeacherTurns) -> None:
        self.turns = turns
        self._stage, self._bridge, self._group = stage, bridge, group
        # Buffers must stay as they are until they are sent.
        self._leaving: deque[tuple[dict[int, Tensor], list[Any]]] = deque()
        self._sent = 0

    def may_compute(self, microbatches: Sequence[Batch], window: Window) -> bool:
        """Wait until the student is near enough to a window; False where it has ended."""
        return self.turns.may_compute(window_label(microbatches, window), window.samples)

    def compute(self, microbatches: Sequence[Batch], window: Window) -> None:
        """Compute a window, and begin to send it."""
        while self._leaving and self._sent < self.turns.begun - 1:
            self._let_go()
        packed = self._bridge.pack(self._stage.run(microbatches), window)
        self._leaving.append((packed, [self._group.send([tensor], rank, 0) for rank, tensor in packed.items()]))

    def _let_go(self) -> None:
        """Wait until the oldest window is sent, whose student has begun a later one; no name here outlives the call."""
        for work in self._leaving[0][1]:
            work.wait()
        self._leaving.popleft()
        self._sent += 1


def window_label(microbatches: Sequence[Batch], window: Window) -> str:
    """What the first rank of either side calls a window: by its size and its first sample, which both have."""
    return f"{window.samples} samples from {int(microbatches[0]['sample_ids'][0])}"
