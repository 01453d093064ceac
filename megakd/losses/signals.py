"""What goes into a distillation loss from the teacher, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DenseSignal:
    """The teacher's side of a microbatch: its distributions over the whole vocabulary, not yet computed.

    hidden: [n, h_t], or [n/tp, h_t] under sequence parallelism; n = s * b rows in (s, b) order.
    head: [v/tp, h_t], this rank's rows of the teacher's output layer, the same global ids as the student's rows.
    """

    hidden: Tensor
    head: Tensor


@dataclass(frozen=True)
class LossSums:
    """Sums over this rank's tokens, weighted by the token weights; all ranks of `tp_group` hold the same.

    total: kd_weight * T^2 * kd + ce_weight * ce (without T^2 where `temperature_squared` is off); the only one
        that carries a gradient.
    kd, ce: nats, before their weights and the T^2 factor.
    num_tokens: int64, tokens whose weight is not 0.
    """

    total: Tensor
    kd: Tensor
    ce: Tensor
    num_tokens: Tensor


@dataclass(frozen=True)
class TokenStatistics:
    """Per-token figures for evaluation, each [n]; all ranks of `tp_group` hold the same.

    kd, ce: nats, unweighted and without the T^2 factor; kd is 0 without a teacher.
    teacher_ce: the teacher's own cross-entropy, None without a teacher.
    agree: whether student and teacher put the same id first, the lowest one among equals; None without a teacher.
    """

    kd: Tensor
    ce: Tensor
    teacher_ce: Tensor | None
    agree: Tensor | None
