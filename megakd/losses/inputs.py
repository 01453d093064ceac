"""Checks of what a loss is given, and its settings in the form that the chunks need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megakd.losses.chunking import chunk_rows
from megakd.losses.divergences import get_divergence
from megakd.losses.logit_form import build_logit_form
from megakd.losses.objective import Objective
from megakd.losses.shards import VocabularyShard, build_shard, compute_dtype, gather_sequence
from megakd.losses.signals import DenseSignal, SparseSignal
from megakd.losses.sparse_inputs import check_shape, check_sparse


@dataclass(frozen=True)
class LossInputs:
    """Checked inputs of one call; labels and token_weights are [n] on every tensor rank. `dtype` is that of logits."""

    objective: Objective
    kd_factor: float
    labels: Tensor
    token_weights: Tensor
    signal: DenseSignal | SparseSignal | None
    chunk_rows: int
    sequence_parallel: bool
    dtype: torch.dtype

    def chunks(self) -> Iterator[slice]:
        """The rows of each chunk."""
        count = self.labels.shape[0]
        for start in range(0, count, self.chunk_rows):
            yield slice(start, min(start + self.chunk_rows, count))

    def rows(self, hidden: Tensor, is_spread: bool | None = None) -> Tensor:
        """Hidden states of all n tokens on every tensor rank; a token of weight 0 has none that are not finite.

        is_spread: whether `hidden` is a stretch of the sequence; None: as the student's is.
        """
        spread = self.sequence_parallel if is_spread is None else is_spread
        rows = gather_sequence(hidden.detach(), self.objective.shard.group if spread else None)
        hidden_tokens = self.token_weights == 0
        if not rows.is_cuda and bool(rows[hidden_tokens].isfinite().all()):
            return rows
        # 0 times what is not finite would not be 0.
        return rows.masked_fill(hidden_tokens.unsqueeze(1), 0.0)


def build_inputs(
    student_hidden: Tensor,
    student_head: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    signal: DenseSignal | SparseSignal | None,
    *,
    kd_weight: float,
    ce_weight: float,
    vocab_size: int,
    temperature: float,
    teacher_temperature: float | None,
    temperature_squared: bool,
    divergence: str,
    jsd_beta: float | None,
    skew_alpha: float | None,
    student_logit_scale: float,
    student_logit_softcap: float | None,
    teacher_logit_scale: float,
    teacher_logit_softcap: float | None,
    tp_group: ProcessGroup | None,
    sequence_parallel: bool,
    chunk_mib: int | None,
) -> LossInputs:
    """Check everything and choose the chunk; see `distillation_loss` for the arguments. Raises ValueError."""
    known = get_divergence(divergence, jsd_beta=jsd_beta, skew_alpha=skew_alpha)
    if not isinstance(temperature, int | float) or not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be > 0. Use 1.0 to leave the logits unscaled.")
    if teacher_temperature is not None and not 0.0 < teacher_temperature < float("inf"):
        raise ValueError(f"teacher_temperature is {teacher_temperature}; it must be > 0. Use None for `temperature`.")
    for name, weight in (("kd_weight", kd_weight), ("ce_weight", ce_weight)):
        if not 0.0 <= weight < float("inf"):
            raise ValueError(f"{name} is {weight}; it must be a number of at least 0.")
    if sequence_parallel and tp_group is None:
        raise ValueError("sequence_parallel is set without tp_group; hidden states are spread over that group's ranks.")
    student_form = build_logit_form("student", student_logit_scale, student_logit_softcap)
    teacher_form = build_logit_form("teacher", teacher_logit_scale, teacher_logit_softcap)
    if signal is not None and not isinstance(signal, DenseSignal | SparseSignal):
        raise ValueError(
            f"signal is a {type(signal).__name__}; it must be a DenseSignal of hidden states and head, a SparseSignal "
            "or None."
        )
    if signal is None and kd_weight != 0.0:
        raise ValueError(f"kd_weight is {kd_weight} without a teacher signal; it must be 0 for cross-entropy alone.")
    if isinstance(signal, SparseSignal):
        teacher = teacher_temperature, teacher_logit_scale, teacher_logit_softcap
        check_sparse(signal, token_weights, vocab_size, divergence, teacher)
    shard = build_shard(student_head.shape[0], vocab_size, tp_group)
    dense = signal if isinstance(signal, DenseSignal) else None
    shards = [shard.tp_size if sequence_parallel else 1] * 2
    if dense is not None and dense.is_spread is not None:
        shards[1] = shard.tp_size if dense.is_spread else 1
    _check_shapes(student_hidden, student_head, labels, token_weights, dense, shards)
    if dense is not None:
        _check_teacher_rows(dense.head, student_head, shard)
    _check_labels(labels, token_weights, vocab_size)

    tempered = 1.0 if signal is None else temperature
    kd_factor = kd_weight * tempered**2 if temperature_squared else kd_weight
    objective = Objective(
        shard,
        None if dense is None else known,
        tempered,
        temperature if teacher_temperature is None else teacher_temperature,
        kd_factor / tempered,
        ce_weight,
        student_form,
        teacher_form,
    )
    dtype = compute_dtype(student_hidden, *([] if dense is None else [dense.hidden]))
    rows = chunk_rows(
        labels.shape[0],
        shard.width,
        device_type=student_hidden.device.type,
        chunk_mib=chunk_mib,
        element_size=dtype.itemsize,
        models=1 if dense is None else 2,
    )
    # A slice step of 0 is refused, also where there is nothing to step over.
    return LossInputs(objective, kd_factor, labels, token_weights, signal, max(1, rows), sequence_parallel, dtype)


def _check_shapes(
    hidden: Tensor, head: Tensor, labels: Tensor, token_weights: Tensor, signal: DenseSignal | None, shards: list[int]
) -> None:
    """`shards`: tensor ranks that the student's and the teacher's hidden states are spread over."""
    rows = labels.shape[0]
    check_shape(labels, "labels", [rows])
    check_shape(token_weights, "token_weights", [rows])
    if rows % max(shards):
        raise ValueError(
            f"labels has {rows} rows; sequence parallelism wants a multiple of the {max(shards)} tensor ranks."
        )
    check_shape(hidden, "student_hidden", [rows // shards[0], head.shape[-1]])
    if signal is not None:
        if signal.head.dim() != 2:
            raise ValueError(f"signal.head is {list(signal.head.shape)}; it must be [rows, h].")
        check_shape(signal.hidden, "signal.hidden", [rows // shards[1], signal.head.shape[-1]])
        _check_same_dtype("signal.hidden", signal.hidden, "signal.head", signal.head)
    _check_same_dtype("student_hidden", hidden, "student_head", head)
    if not hidden.is_floating_point():
        raise ValueError(f"student_hidden is {hidden.dtype}; it must be floating point.")
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels is {labels.dtype}; it must be int64.")


def _check_teacher_rows(teacher_head: Tensor, head: Tensor, shard: VocabularyShard) -> None:
    """One rank fits any padding; on several the padding decides which ids a rank holds."""
    found, rows = teacher_head.shape[0], head.shape[0]
    if shard.tp_size > 1 and found != rows:
        raise ValueError(
            f"signal.head has {found} rows on this rank and student_head {rows}; both must be the same global ids. Pad "
            f"or cut the teacher's head to {rows * shard.tp_size} rows before it is sharded."
        )
    if found < shard.vocab_size and shard.tp_size == 1:
        raise ValueError(
            f"signal.head has {found} rows; it must have one for each of the vocab_size {shard.vocab_size} ids. Give "
            "the number of ids that both models have."
        )


def _check_same_dtype(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    if first.dtype != second.dtype:
        raise ValueError(f"{first_name} is {first.dtype} and {second_name} {second.dtype}; cast one of them.")


def _check_labels(labels: Tensor, token_weights: Tensor, vocab_size: int) -> None:
    """Refuse labels outside the vocabulary that have a weight, and weights that are no weights."""
    not_weights = ~((token_weights >= 0) & token_weights.isfinite())
    if labels.is_cuda:
        torch._assert_async(~not_weights.any(), "token_weights must be finite and at least 0")
    elif not_weights.any():
        row = int(not_weights.nonzero()[0])
        raise ValueError(
            f"token_weights is {token_weights[row].item():g} in row {row}; it must be finite and at least 0. Use 0 to "
            "hide a token."
        )
    wrong = ((labels < 0) | (labels >= vocab_size)) & (token_weights != 0)
    rule = f"labels with a weight must be at least 0 and below vocab_size {vocab_size}"
    if labels.is_cuda:
        # Reading the answer would make the host wait for the device in every microbatch.
        torch._assert_async(~wrong.any(), rule)
    elif wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"label {int(labels[row])} in row {row}: {rule}. Mask the token or check the tokenizer.")
