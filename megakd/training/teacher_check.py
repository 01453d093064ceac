"""Whether the teacher is still the one it was: its cross-entropy on one fixed microbatch, measured again.

A teacher whose weights went wrong in memory goes on giving distributions, and the student learns them: one whose
logits are all alike teaches the uniform distribution at a loss that falls as any other.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from megakd.common.errors import UserError
from megakd.common.logging import log
from megakd.config.schema import Config
from megakd.data.batches import Batch, EvaluationBatches
from megakd.evaluation.evaluate import sum_over_ranks
from megakd.losses import DenseSignal, token_statistics
from megakd.parallel.mesh import ModelMesh
from megakd.parallel.rank_0 import on_rank_0
from megakd.teacher import DenseTeacher
from megakd.training.architectures import shared_vocab_size
from megakd.training.build import DTYPES, Student
from megakd.training.held_out import held_out_batches
from megakd.training.train_data import HeldOutData, held_out_sources
from megakd.training.watch import TeacherFigure

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
"""How far a figure may lie from the first, as a share of it (of 1 nat where it is less).

The same weights on the same samples in one layout give the same bits; other layouts and kernels round otherwise.
"""
_GUESS = 0.999  # of ln(vocabulary): what logits that are all alike come to, rounded


@dataclass(frozen=True)
class Measured:
    """What the check goes by.

    Attributes:
        path: the teacher's, for messages.
        dtype: what the teacher computes in.
        is_offloaded: its weights wait in main memory between windows.
        where: what the samples are of, for messages.
        identity: of teacher and samples; a figure of another one is no figure to compare with.
    """

    path: str
    dtype: torch.dtype
    is_offloaded: bool
    where: str
    identity: str


class TeacherCheck:
    """Stands in for the teacher where it is measured. All methods are collective over the student's ranks.

    Args:
        batches: this data rank's, of which the first is measured.
        vocab_size: shared vocabulary of student and teacher.
        sequence_parallel: the student's.
    """

    def __init__(
        self,
        teacher: DenseTeacher,
        measured: Measured,
        batches: EvaluationBatches,
        mesh: ModelMesh,
        *,
        vocab_size: int,
        sequence_parallel: bool,
        chunk_mib: int | None,
    ) -> None:
        self.measured = measured
        self._teacher, self._batches, self._mesh = teacher, batches, mesh
        self._vocab_size, self._sequence_parallel, self._chunk_mib = vocab_size, sequence_parallel, chunk_mib
        self._sums: Tensor | None = None

    def run(self) -> None:
        """Run the teacher over the microbatch alone, which its own ranks must do as well."""
        self._sums = None
        self.signals(list(islice(self._batches, 1)))

    @torch.no_grad()
    def signals(self, microbatches: Sequence[Batch]) -> Sequence[DenseSignal | None]:
        """See Teacher.signals; the first microbatch after a judgement is measured."""
        signals = self._teacher.signals(microbatches)
        if self._sums is None:
            self._sums = torch.zeros(2, dtype=torch.float64)
            if signals[0] is not None:
                self._sums += self._measure(microbatches[0], signals[0]).cpu()
        return signals

    def judge(self, first: TeacherFigure, step: int) -> TeacherFigure:
        """Hold what was measured last, after step `step`, against the run's first figure. Returns what is kept of it.

        Raises:
            UserError: the teacher has changed, or its figure is not a number.
        """
        assert self._sums is not None, "a microbatch comes first"
        total, count = sum_over_ranks(self._sums, self._mesh).tolist()
        self._sums = None
        value, measured = total / count, self.measured
        if first.identity != measured.identity:
            if first.identity is not None:
                log.info("the teacher's first figure is of another teacher, layout or held-out data, and taken again")
            first = TeacherFigure(identity=measured.identity)
        if first.value is None:
            self._look_at_first(value, step)
            return TeacherFigure(value, step, step, measured.identity)
        tolerance = TOLERANCE[measured.dtype]
        if not abs(value - first.value) <= tolerance * max(abs(first.value), 1.0):
            raise UserError(self._changed(value, first, step, tolerance))
        return TeacherFigure(first.value, first.step, step, measured.identity)

    def _measure(self, batch: Batch, signal: DenseSignal) -> Tensor:
        """Sum of the teacher's cross-entropy over a microbatch's tokens that count, all if none does; and how many."""
        weights = batch["loss_mask"].t().reshape(-1)
        weights = torch.where((weights != 0).any(), weights, torch.ones_like(weights))
        spread = self._sequence_parallel if signal.is_spread is None else signal.is_spread
        found = token_statistics(
            signal.hidden, signal.head, batch["labels"].t().reshape(-1), weights, None,
            vocab_size=self._vocab_size, tp_group=self._mesh.groups.tp, sequence_parallel=spread,
            chunk_mib=self._chunk_mib,
        )  # fmt: skip
        counted = weights != 0
        return torch.stack([found.ce[counted].double().sum(), counted.double().sum()])

    def _look_at_first(self, value: float, step: int) -> None:
        """Refuse a first figure that is no number, and say where it is that of a guess."""
        guess = math.log(self._vocab_size)
        if not math.isfinite(value):
            raise UserError(
                f"{self._told(value, step)}; it must be a finite number. Its weights are damaged "
                "(tools/convert_checkpoint.py verify names those that are not finite), or overflow in teacher.dtype."
            )
        if value >= _GUESS * guess:
            log.warning(
                f"{self._told(value, step)}, no better than a guess among {self._vocab_size} ids ({guess:.6g}): its "
                "weights are random or damaged, or the data is nothing that it knows"
            )

    def _changed(self, value: float, first: TeacherFigure, step: int, tolerance: float) -> str:
        """Say what was found, from where on the run is not to be trusted, and what helps."""
        assert first.value is not None and first.step is not None and first.good_step is not None
        word = str(self.measured.dtype).removeprefix("torch.")
        offload = " or set teacher.offload to none," if self.measured.is_offloaded else ""
        return (
            f"{self._told(value, step)} and had {first.value:.6g} {_after(first.step)}; the same weights give the same "
            f"to {tolerance:g} of it ({word}). Its weights went wrong in memory after step {first.good_step}, and so "
            f"did what was learned since. Remove checkpoints after step {first.good_step}, if any; the same command "
            "goes on from the one before. Should it happen again, test the memory (nvidia-smi -q -d "
            f"ECC),{offload} or run "
            "elsewhere."
        )

    def _told(self, value: float, step: int) -> str:
        """The figure in words."""
        measured = self.measured
        return f"the teacher ({measured.path}) has a cross-entropy of {value:.6g} on {measured.where} {_after(step)}"


def build_teacher_check(
    config: Config, teacher: DenseTeacher, student: Student, samples: HeldOutData, contents: str, layer_spec: str
) -> TeacherCheck:
    """Make the check of a run's teacher. Collective over the student's ranks.

    Args:
        samples: see held_out.check_samples.
        contents: a hash of the teacher's files.
    """
    assert config.teacher is not None
    mesh = student.mesh
    dtype = config.teacher.dtype or config.run.dtype
    vocab_size = shared_vocab_size(config)

    def identify() -> str:
        """A hash that tells the teacher and the samples."""
        batches = EvaluationBatches(
            samples.samples, samples.ids, micro_batch_size=config.data.micro_batch_size, data_parallel_rank=0,
            data_parallel_size=1, max_tokens=config.evaluation.max_tokens,
        )  # fmt: skip
        found = hashlib.blake2b(repr([contents, dtype, layer_spec, vocab_size]).encode(), digest_size=16)
        for batch in islice(batches, mesh.dp_size):
            for name in ("tokens", "labels", "loss_mask", "position_ids"):
                found.update(batch[name].numpy().tobytes())
        return found.hexdigest()

    held_out = held_out_sources(config, config.evaluation.split) is not None
    return TeacherCheck(
        teacher,
        Measured(
            path=config.teacher.path,
            dtype=DTYPES[dtype],
            is_offloaded=config.teacher.offload == "cpu",
            where="held-out samples" if held_out else "the samples of the first step",
            identity=on_rank_0(identify),
        ),
        held_out_batches(config, samples, mesh, torch.device(torch.cuda.current_device())),
        mesh,
        vocab_size=vocab_size,
        sequence_parallel=student.sequence_parallel,
        chunk_mib=config.distill.loss_chunk_mib,
    )


def _after(step: int) -> str:
    return f"after step {step}" if step else "before the first step"
