"""Divergences between teacher and student by name: what each sums over a shard, and its gradient.

A divergence works on blocks of rows of one rank's logits, at the temperature and with each row's local maximum
taken off, in buffers that it overwrites. p = softmax(u/T) is the teacher, q = softmax(z/T) the student.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """The three steps of one divergence.

    reduce(z, u, scratch, total, weighted): z, u, scratch [r, v/tp]. Leaves z, turns u into e^u; writes total [r, 1]
        = sum e^u, and weighted [r, 1], a sum with the weights e^u.
    merge(mean, z_shift, u_shift, z_log_sum, u_log_sum) -> [c]: the divergence over the whole vocabulary. Of all ranks,
        [tp, c]: mean = weighted / total, what makes z and u logarithms of q and p, ln sum e^z and ln sum e^u.
    add_gradient(g, u, u_factor): adds the teacher's part of the gradient with respect to z/T to g [r, v/tp], which
        holds q times the same weight; u_factor [r, 1] turns what `reduce` left into weighted p.
    """

    reduce: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    merge: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    add_gradient: Callable[[Tensor, Tensor, Tensor], None]


def _reduce_forward_kl(z: Tensor, u: Tensor, scratch: Tensor, total: Tensor, weighted: Tensor) -> None:
    torch.sub(u, z, out=scratch)
    torch.sum(u.exp_(), 1, keepdim=True, out=total)
    torch.sum(scratch.mul_(u), 1, keepdim=True, out=weighted)


def _merge_forward_kl(mean: Tensor, z_shift: Tensor, u_shift: Tensor, z_log_sum: Tensor, u_log_sum: Tensor) -> Tensor:
    # exp(u_shift + u_log_sum) is the share of p in a shard: 0 in one of padding, where everything here is finite.
    return ((u_shift + u_log_sum).exp() * (mean + u_shift - z_shift)).sum(0)


def _add_forward_kl_gradient(g: Tensor, u: Tensor, u_factor: Tensor) -> None:
    g.addcmul_(u, u_factor, value=-1)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(_reduce_forward_kl, _merge_forward_kl, _add_forward_kl_gradient),
}


def get_divergence(name: str) -> Divergence:
    """The divergence called `name`; ValueError names the known ones."""
    if name not in DIVERGENCES:
        known = ", ".join(sorted(DIVERGENCES))
        raise ValueError(f"divergence is {name!r}; it must be one of: {known}.")
    return DIVERGENCES[name]
