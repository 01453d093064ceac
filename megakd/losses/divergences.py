"""Divergences between teacher and student by name: what each sums over a shard of the vocabulary, and its gradient.

A divergence works on blocks of rows of one rank's logits, divided by their temperatures and with a number per row
taken off, in buffers that it overwrites. p is the teacher's softmax of them, q the student's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """One divergence in one round of statistics (`merge` is given) or in two (`evaluate` is).

    teacher_share: of the mixture that jsd and the skews compare with; without meaning to the others.
    reduce(z, u, scratch, in_place, z_total, u_total, weighted): first round over z, u, scratch [r, v/tp]. Writes
        sum e^z, sum e^u and a sum of its own, [r, 1] each. Turns z into e^z where `in_place` is set, leaves it else.
    merge(mean, z_shift, u_shift, z_log_sum, u_log_sum) -> (loss, mine) [c], [tp, c]: of all ranks, [tp, c]: mean is
        `weighted` over the total of the softmax it is weighted with; what added makes z and u ln q and ln p; and
        ln sum e^z, ln sum e^u. `mine` is the offset below of each rank.
    evaluate(t, p, q, spares, loss, mean): second round. t = ln p - ln q; overwrites t, both spares and p, leaves q.
        Writes this shard's part of the loss and of sum q h, [r, 1] each, and h to p.

    The teacher's buffer then holds e^u, and the gradient by z is q - p, where `separable` is set; otherwise it holds h
    and the gradient is q (h + offset), with the offset from `merge`, or - sum q h.
    """

    name: str
    reduce: Callable[[Tensor, Tensor, Tensor, bool, Tensor, Tensor, Tensor], None]
    merge: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    evaluate: Callable[[Tensor, Tensor, Tensor, list[Tensor], Tensor, Tensor], None] | None = None
    separable: bool = False
    teacher_share: float = 0.5


def get_divergence(name: str, *, jsd_beta: float | None = None, skew_alpha: float | None = None) -> Divergence:
    """The divergence called `name`; ValueError names the known ones, or says what its parameter may be."""
    jsd_beta = 0.5 if jsd_beta is None else jsd_beta
    skew_alpha = 0.1 if skew_alpha is None else skew_alpha
    if name not in DIVERGENCES:
        raise ValueError(f"divergence is {name!r}; it must be one of: {', '.join(sorted(DIVERGENCES))}.")
    if name == "jsd" and not 0.0 < jsd_beta < 1.0:
        raise ValueError(
            f"jsd_beta is {jsd_beta:g}; it must be between 0 and 1, both excluded, where jsd is 0 for any two models. "
            "Use the divergence forward_kl for what 0 tends to, and reverse_kl for 1."
        )
    if name in ("skew_forward_kl", "skew_reverse_kl") and not 0.0 < skew_alpha < 1.0:
        raise ValueError(
            f"skew_alpha is {skew_alpha:g}; it must be between 0 and 1, both excluded. Use the divergence "
            f"{name.removeprefix('skew_')} for 0; at 1 any two models score 0."
        )
    return DIVERGENCES[name](jsd_beta if name == "jsd" else skew_alpha)


def _exponential(x: Tensor, scratch: Tensor, in_place: bool, total: Tensor) -> Tensor:
    """e^x in x or in scratch, and its sum per row."""
    result = x.exp_() if in_place else torch.exp(x, out=scratch)
    torch.sum(result, 1, keepdim=True, out=total)
    return result


def _reduce_forward_kl(
    z: Tensor, u: Tensor, scratch: Tensor, in_place: bool, z_total: Tensor, u_total: Tensor, weighted: Tensor
) -> None:
    torch.sub(u, z, out=scratch)
    _exponential(u, scratch, True, u_total)
    torch.sum(scratch.mul_(u), 1, keepdim=True, out=weighted)
    _exponential(z, scratch, in_place, z_total)


def _merge_forward_kl(
    mean: Tensor, z_shift: Tensor, u_shift: Tensor, z_log_sum: Tensor, u_log_sum: Tensor
) -> tuple[Tensor, Tensor]:
    # exp(u_shift + u_log_sum) is the share of p in a shard: 0 in one of padding, where everything here is finite.
    return ((u_shift + u_log_sum).exp() * (mean + u_shift - z_shift)).sum(0), torch.zeros_like(z_shift)


def _reduce_reverse_kl(
    z: Tensor, u: Tensor, scratch: Tensor, in_place: bool, z_total: Tensor, u_total: Tensor, weighted: Tensor
) -> None:
    _exponential(u, scratch, False, u_total)
    torch.sub(z, u, out=u)
    q = _exponential(z, scratch, in_place, z_total)
    torch.sum(torch.mul(q, u, out=scratch), 1, keepdim=True, out=weighted)


def _merge_reverse_kl(
    mean: Tensor, z_shift: Tensor, u_shift: Tensor, z_log_sum: Tensor, u_log_sum: Tensor
) -> tuple[Tensor, Tensor]:
    ratio_shift = z_shift - u_shift
    loss = ((z_shift + z_log_sum).exp() * (mean + ratio_shift)).sum(0)
    return loss, ratio_shift - loss


def _reduce_totals(
    z: Tensor, u: Tensor, scratch: Tensor, in_place: bool, z_total: Tensor, u_total: Tensor, weighted: Tensor
) -> None:
    _exponential(u, scratch, False, u_total)
    _exponential(z, scratch, in_place, z_total)
    weighted.zero_()


def _row_sums(x: Tensor, out: Tensor) -> Tensor:
    return torch.sum(x, 1, keepdim=True, out=out)


def _split_mixture(t: Tensor, teacher_share: float, spare: Tensor) -> tuple[Tensor, Tensor]:
    """(s, l), in place of t and spare, of the mixture m = w p + (1 - w) q with w = teacher_share.

    s = ln(w p) - ln((1 - w) q) and l = ln(1 + e^-|s|), so that ln m = max(ln(w p), ln((1 - w) q)) + l. Differences to
    ln m are then ln p - ln m = min(s, 0) - l - ln w and ln q - ln m = -max(s, 0) - l - ln(1 - w), without the digits
    that a large t would cost.
    """
    t.add_(math.log(teacher_share) - math.log1p(-teacher_share))
    # Beside terms near -ln w, what log loses to a log1p of three times its cost is one rounding.
    return t, torch.abs(t, out=spare).neg_().exp_().add_(1.0).log_()


def _build_jsd(beta: float) -> Divergence:
    def evaluate(t: Tensor, p: Tensor, q: Tensor, spares: list[Tensor], loss: Tensor, mean: Tensor) -> None:
        s, log_rest = _split_mixture(t, beta, spares[0])
        log_rest.add_(math.log(beta))
        _row_sums(p.mul_(torch.clamp(s, max=0.0, out=spares[1]).sub_(log_rest)), loss)
        log_rest.add_(math.log1p(-beta) - math.log(beta))
        torch.add(s.clamp_(min=0.0), log_rest, out=p).mul_(beta - 1.0)
        _row_sums(torch.mul(p, q, out=spares[0]), mean)
        loss.mul_(beta).add_(mean)

    return Divergence("jsd", _reduce_totals, evaluate=evaluate, teacher_share=beta)


def _build_skew_forward_kl(alpha: float) -> Divergence:
    def evaluate(t: Tensor, p: Tensor, q: Tensor, spares: list[Tensor], loss: Tensor, mean: Tensor) -> None:
        s, log_rest = _split_mixture(t, alpha, spares[0])
        log_ratio = s.clamp_(max=0.0).sub_(log_rest.add_(math.log(alpha)))  # ln p - ln m
        _row_sums(p.mul_(log_ratio), loss)
        torch.exp(log_ratio, out=p).mul_(alpha - 1.0)
        _row_sums(torch.mul(p, q, out=spares[1]), mean)

    return Divergence("skew_forward_kl", _reduce_totals, evaluate=evaluate, teacher_share=alpha)


def _build_skew_reverse_kl(alpha: float) -> Divergence:
    def evaluate(t: Tensor, p: Tensor, q: Tensor, spares: list[Tensor], loss: Tensor, mean: Tensor) -> None:
        s, log_rest = _split_mixture(t, 1.0 - alpha, spares[0])
        log_ratio = s.clamp_(min=0.0).add_(log_rest.add_(math.log(alpha))).neg_()  # ln q - ln m
        _row_sums(torch.mul(log_ratio, q, out=spares[0]), loss)
        torch.sub(log_ratio, torch.exp(log_ratio, out=spares[0]), alpha=alpha, out=p)
        _row_sums(torch.mul(p, q, out=spares[1]), mean)

    return Divergence("skew_reverse_kl", _reduce_totals, evaluate=evaluate, teacher_share=1.0 - alpha)


def _evaluate_tvd(t: Tensor, p: Tensor, q: Tensor, spares: list[Tensor], loss: Tensor, mean: Tensor) -> None:
    torch.sub(q, p, out=spares[0])
    _row_sums(spares[0].abs_(), loss).mul_(0.5)
    torch.sign(t, out=p).mul_(-0.5)
    _row_sums(torch.mul(p, q, out=spares[1]), mean)


# Functions of jsd's beta or the skew's alpha, which the others ignore.
DIVERGENCES: dict[str, Callable[[float], Divergence]] = {
    "forward_kl": lambda _: Divergence("forward_kl", _reduce_forward_kl, merge=_merge_forward_kl, separable=True),
    "reverse_kl": lambda _: Divergence("reverse_kl", _reduce_reverse_kl, merge=_merge_reverse_kl),
    "jsd": _build_jsd,
    "skew_forward_kl": _build_skew_forward_kl,
    "skew_reverse_kl": _build_skew_reverse_kl,
    "tvd": lambda _: Divergence("tvd", _reduce_totals, evaluate=_evaluate_tvd),
}
