"""The distillation loss as others compute it, each written from its published definition; tensor-parallel size 1.

A form takes (hidden [n, h], head [v, h], teacher hidden [n, h_t], teacher head [v, h_t], labels [n], divergence) and
returns kd_weight * kd + ce_weight * ce as a scalar with autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

KD_WEIGHT, CE_WEIGHT, JSD_BETA, SKEW_ALPHA = 0.7, 0.3, 0.5, 0.1
Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, str], Tensor]


def plain(x: Tensor, w: Tensor, xt: Tensor, wt: Tensor, labels: Tensor, divergence: str) -> Tensor:
    """Whole logits of both models and autograd through the definition."""
    z, u = _widened(x @ w.t()), _widened(xt @ wt.t())
    kd = _divergence(u.log_softmax(-1), z.log_softmax(-1), divergence).sum()
    return KD_WEIGHT * kd + CE_WEIGHT * F.cross_entropy(z, labels, reduction="sum")


def chunked_autograd(x: Tensor, w: Tensor, xt: Tensor, wt: Tensor, labels: Tensor, divergence: str) -> Tensor:
    """`plain` in chunks of 256 tokens that autograd keeps until backward."""
    parts = zip(x.split(256), xt.split(256), labels.split(256), strict=True)
    return torch.stack([plain(a, w, b, wt, y, divergence) for a, b, y in parts]).sum()


def openrlhf(x: Tensor, w: Tensor, xt: Tensor, wt: Tensor, labels: Tensor, divergence: str) -> Tensor:
    """The teacher's cross-entropy: its softmax times the student's log-softmax, with infinite logits masked out."""
    z, u = x @ w.t(), xt @ wt.t()
    products = u.softmax(-1, dtype=torch.promote_types(z.dtype, torch.float32)) * _widened(z).log_softmax(-1)
    kd = -torch.masked_fill(products, z.isinf(), 0.0).sum(-1).sum()
    return KD_WEIGHT * kd + CE_WEIGHT * F.cross_entropy(_widened(z), labels, reduction="sum")


def modelopt(x: Tensor, w: Tensor, xt: Tensor, wt: Tensor, labels: Tensor, divergence: str) -> Tensor:
    """Vocabulary-parallel: maxima and sums of exponentials apart (they are reduced over ranks), then kl_div."""
    z, u = _widened(x @ w.t()), _widened(xt @ wt.t())
    with torch.no_grad():
        u = u - u.amax(-1, keepdim=True)
        log_p = u - u.exp().sum(-1, keepdim=True).log()
    shifted = z - z.detach().amax(-1, keepdim=True)
    log_q = shifted - shifted.exp().sum(-1, keepdim=True).log()
    kd = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).sum()
    return KD_WEIGHT * kd - CE_WEIGHT * log_q.gather(1, labels[:, None]).sum()


FORMS: dict[str, Form] = {
    "plain torch": plain,
    "openrlhf's form": openrlhf,
    "modelopt's form": modelopt,
    "chunked autograd": chunked_autograd,
}
FORWARD_KL_ALONE = ("openrlhf's form", "modelopt's form")


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _divergence(log_p: Tensor, log_q: Tensor, name: str) -> Tensor:
    """Of q from p, [n]."""

    def mixture(teacher_share: float) -> Tensor:
        return torch.logaddexp(log_p + math.log(teacher_share), log_q + math.log(1 - teacher_share))

    if name == "forward_kl":
        return _kl(log_p, log_q)
    if name == "reverse_kl":
        return _kl(log_q, log_p)
    if name == "jsd":
        m = mixture(JSD_BETA)
        return JSD_BETA * _kl(log_p, m) + (1 - JSD_BETA) * _kl(log_q, m)
    if name == "skew_forward_kl":
        return _kl(log_p, mixture(SKEW_ALPHA))
    if name == "skew_reverse_kl":
        return _kl(log_q, mixture(1 - SKEW_ALPHA))
    assert name == "tvd"
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
