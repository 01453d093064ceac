"""The online teacher: a forward-only pipeline over its own mesh, once per window of microbatches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megakd.config.architecture import GPTArchitecture
from megakd.convert import load_head, load_weights
from megakd.losses import DenseSignal
from megakd.models.gpt import HiddenStateGPT, build_gpt
from megakd.models.microbatch import run_stage
from megakd.models.parameters import canonical_parameters
from megakd.parallel.mesh import ModelMesh
from megakd.parallel.pipeline import run_pipeline


class OnlineTeacher:
    """Runs the teacher beside the student: no gradients, no optimizer, not in the checkpoint.

    Args:
        model: this rank's stage of the teacher, without its head.
        head: [v/tp, h_t] the teacher's output layer in the student's vocabulary partition, on the student's last
            stage; None on the others.
    """

    def __init__(self, model: HiddenStateGPT, mesh: ModelMesh, head: Tensor | None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.mesh = mesh
        self.head = head

    @torch.no_grad()
    def signals(self, microbatches: Sequence[dict[str, Tensor]]) -> Sequence[DenseSignal | None]:
        """See Teacher.signals."""
        micro_batch_size, sequence_length = microbatches[0]["tokens"].shape
        hidden = run_pipeline(
            self.mesh,
            self.model,
            _forward_step,
            microbatches,
            num_microbatches=len(microbatches),
            micro_batch_size=micro_batch_size,
            sequence_length=sequence_length,
            forward_only=True,
        )
        if self.head is None:
            return [None] * len(microbatches)
        return [DenseSignal(state.flatten(0, 1), self.head) for state in hidden]


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
    student_padded_vocab: int,
) -> OnlineTeacher:
    """Build the teacher's stage on `mesh` and read just this rank's weights from the Hugging Face folder.

    Args:
        student_padded_vocab: rows of the student's head over all tensor ranks; the teacher's head is cut the same way.
    """
    model = build_gpt(
        architecture, mesh, dtype=dtype, layer_spec=layer_spec, sequence_parallel=sequence_parallel, head=False
    )
    load_weights(canonical_parameters(model).items(), path, architecture, tp_rank=mesh.tp_rank, tp_size=mesh.tp_size)
    head = None
    if mesh.is_last_stage:
        head = load_head(
            path,
            tp_rank=mesh.tp_rank,
            tp_size=mesh.tp_size,
            padded_vocab=student_padded_vocab,
            dtype=dtype,
            device=torch.cuda.current_device(),
        )
    return OnlineTeacher(model, mesh, head)
