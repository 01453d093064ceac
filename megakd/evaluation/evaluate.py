"""Measure a student, and its teacher beside it, on held-out tokens over the parallel layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.common.errors import UserError
from megakd.losses import DenseSignal, token_statistics
from megakd.models.microbatch import run_stage
from megakd.parallel.mesh import ModelMesh
from megakd.parallel.pipeline import run_pipeline
from megakd.teacher import DenseTeacher

_Pair = tuple[dict[str, Tensor], DenseSignal | None]


@dataclass(frozen=True)
class Scores:
    """Means over held-out tokens by their weights, in nats; the teacher's are None where there is no teacher.

    `num_tokens` counts those whose weight is not 0.
    """

    num_tokens: int
    cross_entropy: float
    perplexity: float
    kl_to_teacher: float | None = None
    agreement: float | None = None
    teacher_cross_entropy: float | None = None

    def to_dict(self) -> dict[str, float | int | None]:
        """For a line of JSON."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    mesh: ModelMesh,
    microbatches: Iterable[dict[str, Tensor]],
    teacher: DenseTeacher | None,
    *,
    vocab_size: int,
    chunk_mib: int | None,
    sequence_parallel: bool,
    window: int,
) -> Scores:
    """Run the model forward over held-out microbatches, `window` of them at a time.

    Args:
        microbatches: batches of one shape on every rank; `loss_mask` has tokens' weights, 0 where one does not count.
        vocab_size: shared vocabulary of student and teacher.

    Returns:
        The same scores on every rank. KL is of the teacher from the student at temperature 1; agreement is the share
        of the weight where both have the same most probable next token.

    Raises:
        UserError: no token counts.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(6, dtype=torch.float64)

    def forward_step(pairs: Iterator[_Pair], stage: torch.nn.Module) -> tuple[Any, Callable[..., Tensor]]:
        batch, signal = next(pairs)

        def measure(hidden_and_head: tuple[Tensor, Tensor], non_loss_data: bool) -> Tensor:
            hidden, head = hidden_and_head
            weights = batch["loss_mask"].t().reshape(-1)
            statistics = token_statistics(
                hidden.flatten(0, 1), head, batch["labels"].t().reshape(-1), weights, signal,
                vocab_size=vocab_size, tp_group=mesh.groups.tp, sequence_parallel=sequence_parallel,
                chunk_mib=chunk_mib,
            )  # fmt: skip
            columns = [torch.ones_like(weights), statistics.ce]
            if statistics.agree is not None and statistics.teacher_ce is not None:
                columns += [statistics.kd, statistics.agree, statistics.teacher_ce]
            counted = weights != 0  # what rows without weight hold may be no number
            factors = weights[counted].double()
            sums_of = [(column[counted].double() * factors).sum() for column in columns]
            return torch.stack([torch.count_nonzero(weights).double(), *sums_of])

        return run_stage(stage, batch), measure

    for batches in _windows(microbatches, window):
        signals: Sequence[DenseSignal | None] = [None] * len(batches)  # and not those of the window before
        if teacher is not None:
            signals = teacher.signals(batches)
        micro_batch_size, sequence_length = batches[0]["tokens"].shape
        records = run_pipeline(
            mesh, model, forward_step, list(zip(batches, signals, strict=True)), num_microbatches=len(batches),
            micro_batch_size=micro_batch_size, sequence_length=sequence_length, forward_only=True,
        )  # fmt: skip
        for record in records:
            sums[: len(record)] += record.cpu()
    model.train(was_training)
    return _scores(sum_over_ranks(sums, mesh), has_teacher=teacher is not None)


def sum_over_ranks(sums: Tensor, mesh: ModelMesh) -> Tensor:
    """Add what each data rank's last stage holds and give the sum to every rank of the mesh. Returns a CPU tensor."""
    sums = sums.to(torch.cuda.current_device())
    if mesh.is_last_stage:
        dist.all_reduce(sums, group=mesh.groups.dp_cp)
    if mesh.pp_size > 1:
        dist.broadcast(sums, src=mesh.last_stage_rank, group=mesh.groups.pp)
    return sums.cpu()


def _windows(items: Iterable[dict[str, Tensor]], size: int) -> Iterator[list[dict[str, Tensor]]]:
    window: list[dict[str, Tensor]] = []
    for item in items:
        window.append(item)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def _scores(sums: Tensor, has_teacher: bool) -> Scores:
    count, weight_sum, *totals = sums.tolist()
    if not count:
        raise UserError(
            "none of the held-out tokens counts: their loss_mask is 0. Use a larger evaluation.max_tokens, another "
            "data.loss_on, or hold out other data."
        )
    ce, kd, agree, teacher_ce = (total / weight_sum for total in totals)
    perplexity = math.exp(min(ce, 700.0))
    if not has_teacher:
        return Scores(int(count), ce, perplexity)
    return Scores(int(count), ce, perplexity, kd, agree, teacher_ce)
