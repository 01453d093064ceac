"""The formulas of docs/loss_mathematics.md, as they are written there, against the definitions and autograd."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

A = B = 0.3


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def jsd(p: Tensor, q: Tensor) -> Tensor:
    m = B * p + (1 - B) * q
    return B * kl(p, m) + (1 - B) * kl(q, m)


# Loss, and the page's g.
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "forward": (kl, lambda p, q: -p / q),
    "reverse": (lambda p, q: kl(q, p), lambda p, q: (q / p).log()),
    "jsd": (jsd, lambda p, q: (1 - B) * (q / (B * p + (1 - B) * q)).log()),
    "skew_forward": (
        lambda p, q: kl(p, A * p + (1 - A) * q), lambda p, q: -(1 - A) * p / (A * p + (1 - A) * q),
    ),
    "skew_reverse": (
        lambda p, q: kl(q, (1 - A) * p + A * q),
        lambda p, q: (q / ((1 - A) * p + A * q)).log() - A * q / ((1 - A) * p + A * q),
    ),
    "tvd": (lambda p, q: (p - q).abs().sum() / 2, lambda p, q: (q - p).sign() / 2),
}  # fmt: skip


def logits(seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", LOSSES)
def test_the_rule_gives_each_gradient(name: str) -> None:
    loss, g = LOSSES[name]
    z, p, temperature = logits(1).requires_grad_(), logits(2).softmax(0), 1.7
    q = (z / temperature).softmax(0)
    (expected,) = torch.autograd.grad(loss(p, q), z)
    q = q.detach()
    found = q * (g(p, q) - (q * g(p, q)).sum()) / temperature
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-14)


def test_seven_figures_per_row_and_rank_are_enough() -> None:
    z, u, label, temperature, teacher_temperature = logits(1, 200.0), logits(2, 200.0), 4, 1.7, 0.8
    log_q, log_p = (z / temperature).log_softmax(0), (u / teacher_temperature).log_softmax(0)
    figures = []
    for part in z.split(4), u.split(4):
        figures.append([(piece, piece.max()) for piece in part])
    rows = []
    for (z_r, a), (u_r, c) in zip(*figures, strict=True):
        x, y = (z_r - a) / temperature, (u_r - c) / teacher_temperature
        means = (y.softmax(0) * (y - x)).sum(), (x.softmax(0) * (x - y)).sum()
        rows.append((a, x.logsumexp(0), (temperature * x).logsumexp(0), c, y.logsumexp(0), *means))
    a, lse, lse_1, c, lse_t, d_forward, d_reverse = (torch.stack(column) for column in zip(*rows, strict=True))
    s = (a - a.max()) / temperature - ((a - a.max()) / temperature + lse).logsumexp(0)
    t = (c - c.max()) / teacher_temperature - ((c - c.max()) / teacher_temperature + lse_t).logsumexp(0)
    forward = ((t + lse_t).exp() * (d_forward + t - s)).sum()
    reverse = ((s + lse).exp() * (d_reverse + s - t)).sum()
    cross_entropy = a.max() + (a - a.max() + lse_1).logsumexp(0) - z[label]
    assert forward.item() == pytest.approx((log_p.exp() * (log_p - log_q)).sum().item(), rel=1e-12)
    assert reverse.item() == pytest.approx((log_q.exp() * (log_q - log_p)).sum().item(), rel=1e-12)
    assert cross_entropy.item() == pytest.approx(-z.log_softmax(0)[label].item(), rel=1e-12)


def test_a_bucket_leaves_out_how_the_rest_is_shared_out() -> None:
    p, q, k = logits(1).softmax(0), logits(2).softmax(0), 5
    bucket = kl(torch.cat([p[:k], p[k:].sum(0, True)]), torch.cat([q[:k], q[k:].sum(0, True)]))
    rest = p[k:].sum() * kl(p[k:] / p[k:].sum(), q[k:] / q[k:].sum())
    assert (bucket + rest).item() == pytest.approx(kl(p, q).item(), rel=1e-12)


def test_jsd_tends_to_both_kls_after_division() -> None:
    p, q, small = logits(1).softmax(0), logits(2).softmax(0), 1e-6

    def divided(b: float, by: float) -> float:
        m = b * p + (1 - b) * q
        return ((b * kl(p, m) + (1 - b) * kl(q, m)) / by).item()

    assert math.isclose(divided(small, small), kl(p, q).item(), rel_tol=1e-3)
    assert math.isclose(divided(1 - small, small), kl(q, p).item(), rel_tol=1e-3)
