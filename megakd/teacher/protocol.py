"""What the training step asks of a teacher, wherever its signal comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from megakd.losses import DenseSignal, SparseSignal


class Teacher(Protocol):
    """Gives the signal for a window of microbatches."""

    def signals(self, microbatches: Sequence[dict[str, Tensor]]) -> Sequence[DenseSignal | SparseSignal | None]:
        """One signal per microbatch on the student's last pipeline stage; None in each place on other stages.

        Collective: every rank of the teacher and of the student calls it with its own microbatches.
        """
        ...


class DenseTeacher(Protocol):
    """A teacher whose whole distributions are known."""

    def signals(self, microbatches: Sequence[dict[str, Tensor]]) -> Sequence[DenseSignal | None]:
        """As Teacher.signals."""
        ...
