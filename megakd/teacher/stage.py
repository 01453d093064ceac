"""A teacher's pipeline stage: forward passes that end in hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megakd.config.architecture import GPTArchitecture
from megakd.convert import load_weights
from megakd.data.batches import Batch
from megakd.models.gpt import HiddenStateGPT, build_gpt
from megakd.models.microbatch import run_stage
from megakd.models.parameters import canonical_parameters
from megakd.parallel.mesh import ModelMesh
from megakd.parallel.pipeline import run_pipeline


class TeacherStage:
    """This rank's layers of the teacher, without its head: no gradients, no optimizer, not in the checkpoint."""

    def __init__(self, model: HiddenStateGPT, mesh: ModelMesh) -> None:
        self.model = model.eval().requires_grad_(False)
        self.mesh = mesh

    @torch.no_grad()
    def run(self, microbatches: Sequence[Batch]) -> list[Tensor]:
        """Hidden states [s(/tp), b, h_t] of the teacher's own microbatches on its last stage, nothing on the others.

        Collective over the mesh.
        """
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


def build_teacher_stage(
    path: str,
    architecture: GPTArchitecture,
    mesh: ModelMesh,
    *,
    dtype: torch.dtype,
    layer_spec: str,
    sequence_parallel: bool,
) -> TeacherStage:
    """Build the teacher's stage on `mesh` and read just this rank's weights from the Hugging Face folder."""
    model = build_gpt(
        architecture, mesh, dtype=dtype, layer_spec=layer_spec, sequence_parallel=sequence_parallel, head=False
    )
    load_weights(canonical_parameters(model).items(), path, architecture, tp_rank=mesh.tp_rank, tp_size=mesh.tp_size)
    return TeacherStage(model, mesh)


def _forward_step(
    microbatches: Iterator[dict[str, Tensor]], model: torch.nn.Module
) -> tuple[Any, Callable[..., Tensor]]:
    batch = next(microbatches)
    return run_stage(model, batch), lambda hidden, non_loss_data: hidden
