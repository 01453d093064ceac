"""What goes into a distillation loss from the teacher, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DenseSignal:
    """The teacher's side of a microbatch: its distributions over the whole vocabulary, not yet computed.

    hidden: [n, h_t], or [n/tp, h_t] under sequence parallelism; n = s * b rows in (s, b) order.
    head: [v/tp, h_t], this rank's rows of the teacher's output layer, the same global ids as the student's rows. On one
        rank it may be padded to another size; where it has fewer rows than the student's, each call copies it.
    is_spread: whether hidden is [n/tp, h_t], this tensor rank's stretch of the sequence; None: as the student's is.
    """

    hidden: Tensor
    head: Tensor
    is_spread: bool | None = None


SPARSE_MODES = ("sampled", "tail_bucket", "renormalised")


@dataclass(frozen=True)
class SparseSignal:
    """The teacher's side of a microbatch: k ids per token with their probabilities, all n rows on every tensor rank.

    ids: [n, k] int64, global and distinct within a row; -1 (any below 0) is an empty slot.
    probabilities: [n, k], softmax of the teacher's logits over its temperature, or frequencies of draws from it; what
        stands in an empty slot does not count. P is their sum in a row.
    mode: what they stand for.
        sampled: frequencies of draws from the teacher, P = 1; unbiased for the gradient of the forward KL at the
            temperature that was drawn at (arXiv 2503.16870).
        tail_bucket: the teacher's own probabilities, with one bucket of 1 - P for all other ids. A rounding above
            P = 1 leaves a bucket of 0, and so does a row that has every id.
        renormalised: as in tail_bucket, but scaled to P = 1 and nothing else: a biased target, for comparison.
    entropy: [n], the teacher's, nats; for sampled only. Taken off the cross-entropy of the draws it makes the loss an
        unbiased estimate of the forward KL, which may be negative. Where it is None the draws' own entropy is taken
        off: the gradient is the same, and the loss the KL from the draws, which is above the teacher's.
    """

    ids: Tensor
    probabilities: Tensor
    mode: str
    entropy: Tensor | None = None


@dataclass(frozen=True)
class LossSums:
    """Sums over this rank's tokens, weighted by the token weights; all ranks of `tp_group` hold the same.

    total: kd_weight * T^2 * kd + ce_weight * ce (without T^2 where `temperature_squared` is off); the only one
        that carries a gradient.
    kd, ce: nats, before their weights and the T^2 factor.
    num_tokens: int64, tokens whose weight is not 0.
    weight_sum: float64, what means are divided by; exactly num_tokens where those weights are 1.
    """

    total: Tensor
    kd: Tensor
    ce: Tensor
    num_tokens: Tensor
    weight_sum: Tensor


@dataclass(frozen=True)
class TokenStatistics:
    """Per-token figures for evaluation, each [n]; all ranks of `tp_group` hold the same.

    kd, ce: nats, unweighted and without the T^2 factor; kd is 0 without a teacher.
    teacher_ce: the teacher's own cross-entropy, None without a dense signal.
    agree: whether student and teacher put the same id first, the lowest one among equals; None likewise.
    """

    kd: Tensor
    ce: Tensor
    teacher_ce: Tensor | None
    agree: Tensor | None
