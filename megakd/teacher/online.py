"""The online teacher on the student's ranks: a forward-only pipeline over its own mesh, once per window."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.data.batches import Batch
from megakd.losses import DenseSignal
from megakd.models.gpt import HiddenStateGPT
from megakd.parallel.bridge import Bridge
from megakd.parallel.pieces import Window
from megakd.teacher.parking import ParkedWeights
from megakd.teacher.regrouping import Placement, regroup
from megakd.teacher.stage import TeacherStage


@dataclass(frozen=True)
class Crossing:
    """What it takes where the teacher's layout is another than the student's.

    Attributes:
        bridge: from the teacher's last stage to the student's, in ranks of the world.
    """

    student: Placement
    teacher: Placement
    bridge: Bridge


class OnlineTeacher:
    """Runs the teacher beside the student.

    Args:
        head: [v/tp, h_t] the teacher's output layer in the student's vocabulary partition, on the student's last
            stage; None on the others.
        crossing: None where both models have one layout.
        parked: the weights' place in main memory while the teacher does not run; None where they stay.
    """

    def __init__(
        self,
        stage: TeacherStage,
        head: Tensor | None,
        crossing: Crossing | None = None,
        parked: ParkedWeights | None = None,
    ) -> None:
        self._stage = stage
        self.head = head
        self._crossing = crossing
        self._parked = parked

    @property
    def model(self) -> HiddenStateGPT:
        """This rank's layers, without the head."""
        return self._stage.model

    @torch.no_grad()
    def signals(self, microbatches: Sequence[Batch]) -> Sequence[DenseSignal | None]:
        """See Teacher.signals."""
        with self._parked.fetched() if self._parked is not None else nullcontext():
            if self._crossing is None:
                hidden = self._stage.run(microbatches)
            else:
                hidden = self._run_across(self._crossing, microbatches)
        return as_signals(hidden, self.head, len(microbatches), is_spread=None if self._crossing is None else True)

    def _run_across(self, crossing: Crossing, microbatches: Sequence[Batch]) -> list[Tensor]:
        """This rank's stretches of the sequence of the student's microbatches, on the student's last stage."""
        own = regroup(microbatches, crossing.student, crossing.teacher)
        world = dist.group.WORLD
        assert world is not None
        window = window_of(microbatches, crossing.student.mesh.dp_size)
        return crossing.bridge.carry(self._stage.run(own), window, world)


def as_signals(
    hidden: Sequence[Tensor], head: Tensor | None, count: int, *, is_spread: bool | None
) -> Sequence[DenseSignal | None]:
    """One signal for each of the student's `count` microbatches; None for each away from its last stage."""
    if head is None:
        return [None] * count
    return [DenseSignal(state.flatten(0, 1), head, is_spread) for state in hidden]


def window_of(microbatches: Sequence[Batch], data_parallel_size: int) -> Window:
    """The window that these are one data rank's microbatches of."""
    count = len(microbatches[0]["sample_ids"])
    return Window(
        samples=len(microbatches) * count * data_parallel_size,
        length=microbatches[0]["tokens"].numel() // count,
        one_row="cu_seqlens" in microbatches[0],
    )
