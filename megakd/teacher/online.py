"""The online teacher: a forward-only pipeline over its own mesh, once per window of microbatches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megakd.config.architecture import GPTArchitecture
from megakd.convert import load_head, load_weights
from megakd.data.batches import Batch
from megakd.losses import DenseSignal
from megakd.models.gpt import HiddenStateGPT, build_gpt
from megakd.models.microbatch import run_stage
from megakd.models.parameters import canonical_parameters
from megakd.parallel.bridge import Bridge
from megakd.parallel.mesh import ModelMesh
from megakd.parallel.pipeline import run_pipeline
from megakd.teacher.parking import ParkedWeights
from megakd.teacher.regrouping import regroup


@dataclass(frozen=True)
class Crossing:
    """What it takes where the teacher's layout is another than the student's.

    Attributes:
        student_mesh: the mesh that asks for signals.
        micro_batch_size: the teacher's.
        bridge: from the teacher's last stage to the student's.
    """

    student_mesh: ModelMesh
    micro_batch_size: int
    bridge: Bridge


class OnlineTeacher:
    """Runs the teacher beside the student: no gradients, no optimizer, not in the checkpoint.

    Args:
        model: this rank's stage of the teacher, without its head.
        head: [v/tp, h_t] the teacher's output layer in the student's vocabulary partition, on the student's last
            stage; None on the others.
        crossing: None where both models have one layout.
        parked: the weights' place in main memory while the teacher does not run; None where they stay.
    """

    def __init__(
        self,
        model: HiddenStateGPT,
        mesh: ModelMesh,
        head: Tensor | None,
        crossing: Crossing | None = None,
        parked: ParkedWeights | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.mesh = mesh
        self.head = head
        self._crossing = crossing
        self._parked = parked

    @torch.no_grad()
    def signals(self, microbatches: Sequence[dict[str, Tensor]]) -> Sequence[DenseSignal | None]:
        """See Teacher.signals."""
        with self._parked.fetched() if self._parked is not None else nullcontext():
            if self._crossing is None:
                hidden = self._run(microbatches)
            else:
                hidden = self._run_across(self._crossing, microbatches)
        if self.head is None:
            return [None] * len(microbatches)
        is_spread = None if self._crossing is None else True
        return [DenseSignal(state.flatten(0, 1), self.head, is_spread) for state in hidden]

    def _run(self, microbatches: Sequence[Batch]) -> list[Tensor]:
        """Hidden states of the teacher's own microbatches, on its last stage."""
        micro_batch_size, sequence_length = microbatches[0]["tokens"].shape
        return run_pipeline(
            self.mesh,
            self.model,
            _forward_step,
            microbatches,
            num_microbatches=len(microbatches),
            micro_batch_size=micro_batch_size,
            sequence_length=sequence_length,
            forward_only=True,
        )

    def _run_across(self, crossing: Crossing, microbatches: Sequence[Batch]) -> list[Tensor]:
        """This rank's stretches of the sequence of the student's microbatches, on the student's last stage."""
        own = regroup(
            microbatches,
            crossing.student_mesh.groups.dp,
            micro_batch_size=crossing.micro_batch_size,
            data_parallel_rank=self.mesh.dp_rank,
            data_parallel_size=self.mesh.dp_size,
        )
        count = len(microbatches[0]["sample_ids"])
        return crossing.bridge.carry(
            self._run(own),
            samples=len(microbatches) * count * crossing.student_mesh.dp_size,
            length=microbatches[0]["tokens"].numel() // count,
            one_row="cu_seqlens" in microbatches[0],
        )


def _forward_step(
    microbatches: Iterator[dict[str, Tensor]], model: torch.nn.Module
) -> tuple[Any, Callable[..., Tensor]]:
    batch = next(microbatches)
    return run_stage(model, batch), lambda hidden, non_loss_data: hidden


def build_online_teacher(
    path: str,
    architecture: GPTArchitecture,
    mesh: ModelMesh,
    *,
    dtype: torch.dtype,
    layer_spec: str,
    sequence_parallel: bool,
    student_mesh: ModelMesh,
    student_padded_vocab: int,
    crossing: Crossing | None = None,
    is_parked: bool = False,
) -> OnlineTeacher:
    """Build the teacher's stage on `mesh` and read just this rank's weights from the Hugging Face folder.

    Args:
        student_padded_vocab: rows of the student's head over all tensor ranks; the teacher's head is cut the same way.
        is_parked: the weights wait in main memory while the teacher does not run. Its head stays: the loss needs it.
    """
    model = build_gpt(
        architecture, mesh, dtype=dtype, layer_spec=layer_spec, sequence_parallel=sequence_parallel, head=False
    )
    load_weights(canonical_parameters(model).items(), path, architecture, tp_rank=mesh.tp_rank, tp_size=mesh.tp_size)
    head = None
    if student_mesh.is_last_stage:
        head = load_head(
            path,
            tp_rank=student_mesh.tp_rank,
            tp_size=student_mesh.tp_size,
            padded_vocab=student_padded_vocab,
            dtype=dtype,
            device=torch.cuda.current_device(),
        )
    return OnlineTeacher(model, mesh, head, crossing, ParkedWeights(model) if is_parked else None)
