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

    reduce(z, u, scratch) -> (local, log_sum): z, u, scratch [r, v/tp]. Leaves z, overwrites u with e^u; log_sum [r]
        is ln sum e^u, local [r] the divergence of the shard's own distributions less the student's ln sum e^z.
    merge(local, student, teacher) -> [c]: the divergence over the whole vocabulary from all ranks' [tp, c]: local
        divergences, and logarithms of the shares of q and p that fall into each shard.
    add_gradient(g, u, teacher_factor): adds the teacher's part of the gradient with respect to z/T to g [r, v/tp],
        which holds q times the same weight; teacher_factor [r, 1] turns e^u into weighted p.
    """

    reduce: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    merge: Callable[[Tensor, Tensor, Tensor], Tensor]
    add_gradient: Callable[[Tensor, Tensor, Tensor], None]


def _reduce_forward_kl(z: Tensor, u: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    torch.sub(u, z, out=scratch)
    total = u.exp_().sum(1)
    log_sum = total.log()
    return scratch.mul_(u).sum(1).div_(total).sub_(log_sum), log_sum


def _merge_forward_kl(local: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    # Chain rule: the divergence inside each shard plus that between the shares, both weighted by p's share. A
    # shard of padding has share 0 and finite logarithms.
    return (teacher.exp() * (local + teacher - student)).sum(0)


def _add_forward_kl_gradient(g: Tensor, u: Tensor, teacher_factor: Tensor) -> None:
    g.addcmul_(u, teacher_factor, value=-1)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(_reduce_forward_kl, _merge_forward_kl, _add_forward_kl_gradient),
}


def get_divergence(name: str) -> Divergence:
    """The divergence called `name`; ValueError names the known ones."""
    if name not in DIVERGENCES:
        known = ", ".join(sorted(DIVERGENCES))
        raise ValueError(f"divergence is {name!r}; it must be one of: {known}.")
    return DIVERGENCES[name]
