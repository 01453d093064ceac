"""Checks of a sparse signal."""

from __future__ import annotations

import torch
from torch import Tensor

from megakd.losses.signals import SPARSE_MODES, SparseSignal

# What sums of rounded probabilities may be off by; top-k probabilities used as draws are usually further from 1.
_SUM_TOLERANCE = 0.01


def check_sparse(
    signal: SparseSignal,
    token_weights: Tensor,
    vocab_size: int,
    divergence: str,
    teacher: tuple[float | None, float, float | None],
) -> None:
    """Refuse a signal that does not fit or cannot be what its mode says, for the rows that have a weight.

    teacher: temperature, logit scale and soft-cap, which a sparse signal has no use for. Raises ValueError; what would
    need to read a GPU tensor is an asynchronous device assertion there.
    """
    rows = token_weights.shape[0]
    if signal.mode not in SPARSE_MODES:
        raise ValueError(f"signal.mode is {signal.mode!r}; it must be one of: {', '.join(SPARSE_MODES)}.")
    if divergence != "forward_kl":
        raise ValueError(
            f"divergence is {divergence!r} with a sparse signal; it must be forward_kl, since the others need the "
            "teacher's probability of every id. Use a DenseSignal."
        )
    if teacher != (None, 1.0, None):
        raise ValueError(
            "teacher_temperature and the teacher's logit scale and softcap have no effect on a sparse signal, whose "
            "probabilities already have theirs. Leave them out."
        )
    if signal.ids.dim() != 2 or signal.ids.shape[1] == 0 or signal.ids.dtype != torch.int64:
        raise ValueError(f"signal.ids is {list(signal.ids.shape)} {signal.ids.dtype}; it must be [{rows}, k] int64.")
    check_shape(signal.ids, "signal.ids", [rows, signal.ids.shape[1]])
    check_shape(signal.probabilities, "signal.probabilities", list(signal.ids.shape))
    if signal.entropy is not None:
        if signal.mode != "sampled":
            raise ValueError(f"signal.entropy has no effect in the mode {signal.mode}. Leave it out.")
        check_shape(signal.entropy, "signal.entropy", [rows])
        entropy = signal.entropy.unsqueeze(1)
        wrong = ~((entropy >= 0) & entropy.isfinite()) & (token_weights != 0).unsqueeze(1)
        _refuse(wrong, entropy, "signal.entropy is {} in row {}; it must be at least 0 nats.")
    _check_values(signal, token_weights, vocab_size)


def _check_values(signal: SparseSignal, token_weights: Tensor, vocab_size: int) -> None:
    ids, counted = signal.ids, (token_weights != 0).unsqueeze(1)
    p = signal.probabilities.masked_fill(ids < 0, 0.0)
    total = p.sum(1, keepdim=True)
    _refuse(
        (ids >= vocab_size) & counted,
        ids,
        f"id {{}} in row {{}}; ids must be below vocab_size {vocab_size}, which both models have. Drop it before the "
        "probabilities are made.",
    )
    # Neighbours in order show what is there twice.
    ordered = ids.sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0) & counted
    _refuse(twice, ordered, "id {} is there twice in row {}; ids must be distinct. Add their probabilities up.")
    _refuse(~(p >= 0) & counted, p, "signal.probabilities is {} in row {}; it must be at least 0.")
    _refuse(
        (total > 1 + _SUM_TOLERANCE) & counted,
        total,
        "signal.probabilities add up to {} in row {}; they must not exceed 1. Look for an id that is there twice, or "
        "for logits in the place of probabilities.",
    )
    if signal.mode == "sampled":
        _refuse(
            (total < 1 - _SUM_TOLERANCE) & counted,
            total,
            "signal.probabilities add up to {} in row {}; frequencies of draws must add up to 1. Use tail_bucket for "
            "the teacher's own probabilities of some ids.",
        )


def _refuse(wrong: Tensor, values: Tensor, message: str) -> None:
    """Raise for the first element that is wrong, with its value and row in the message."""
    if wrong.is_cuda:
        # Reading the answer would make the host wait for the device in every microbatch.
        torch._assert_async(~wrong.any(), message.format("wrong", "some"))
    elif wrong.any():
        row, slot = wrong.nonzero()[0].tolist()
        raise ValueError(message.format(f"{values[row, slot].item():g}", row))


def check_shape(tensor: Tensor, name: str, shape: list[int]) -> None:
    """Refuse a tensor of another shape."""
    if list(tensor.shape) != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}; it must be {shape} to fit the labels and the heads.")
