"""The losses from their definitions: whole vocabulary, float64, plain autograd, one process."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A microbatch with unsharded heads: hidden [n, h], head [v, h], of which the first vocab_size rows exist."""

    hidden: Tensor
    head: Tensor
    labels: Tensor
    token_weights: Tensor
    teacher_hidden: Tensor | None
    teacher_head: Tensor | None
    vocab_size: int
    kd_weight: float = 0.7
    ce_weight: float = 0.3
    temperature: float = 1.0
    temperature_squared: bool = True
    teacher_temperature: float | None = None
    divergence: str = "forward_kl"
    jsd_beta: float = 0.5
    skew_alpha: float = 0.1
    student_logit_scale: float = 1.0
    student_logit_softcap: float | None = None
    teacher_logit_scale: float = 1.0
    teacher_logit_softcap: float | None = None

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of the loss."""
        names = [field.name for field in dataclasses.fields(self)][6:]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Answer:
    """total, kd and ce of a case, and the gradients of total."""

    total: Tensor
    kd: Tensor
    ce: Tensor
    hidden_grad: Tensor
    head_grad: Tensor


def make_case(
    seed: int,
    *,
    rows: int = 300,
    padded: int = 4160,
    vocab_size: int = 4099,
    student_width: int = 24,
    teacher_width: int = 40,
    dtype: torch.dtype = torch.float64,
    with_teacher: bool = True,
    **settings: Any,
) -> Case:
    """Random models with logits of a few units, random weights with zeros whose labels are -100."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype)

    labels = torch.randint(0, vocab_size, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64).add(0.1).to(dtype)
    hidden_tokens = torch.rand(rows, generator=generator) < 0.2
    if rows == 1:
        hidden_tokens[:] = False
    return Case(
        hidden=normal(rows, student_width, std=1.0),
        head=normal(padded, student_width, std=2.0 / student_width**0.5),
        labels=labels.masked_fill(hidden_tokens, -100),
        token_weights=weights.masked_fill(hidden_tokens, 0.0),
        teacher_hidden=normal(rows, teacher_width, std=1.0) if with_teacher else None,
        teacher_head=normal(padded, teacher_width, std=2.0 / teacher_width**0.5) if with_teacher else None,
        vocab_size=vocab_size,
        **settings,
    )


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(1)


def _mixture(share: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    """ln(share p + (1 - share) q)."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log(1 - share))


def divergence(case: Case, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The case's divergence of q from p, [n]."""
    beta, alpha = case.jsd_beta, case.skew_alpha
    if case.divergence == "jsd":
        log_m = _mixture(beta, log_p, log_q)
        return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    if case.divergence == "tvd":
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(1)
    return {
        "forward_kl": lambda: _kl(log_p, log_q),
        "reverse_kl": lambda: _kl(log_q, log_p),
        "skew_forward_kl": lambda: _kl(log_p, _mixture(alpha, log_p, log_q)),
        "skew_reverse_kl": lambda: _kl(log_q, _mixture(1 - alpha, log_p, log_q)),
    }[case.divergence]()


def _logits(hidden: Tensor, head: Tensor, vocab_size: int, scale: float, softcap: float | None) -> Tensor:
    logits = scale * (hidden @ head.T[:, :vocab_size])
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def token_losses(case: Case, hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """kd and ce of each token [n], from the definitions."""
    student = _logits(hidden, head, case.vocab_size, case.student_logit_scale, case.student_logit_softcap)
    log_q1 = torch.log_softmax(student, dim=1)
    ce = -log_q1.gather(1, case.labels.clamp(min=0)[:, None])[:, 0]
    if case.teacher_hidden is None or case.teacher_head is None:
        return torch.zeros_like(ce), ce
    teacher_inputs = case.teacher_hidden.double(), case.teacher_head.double(), case.vocab_size
    teacher = _logits(*teacher_inputs, case.teacher_logit_scale, case.teacher_logit_softcap)
    log_p = torch.log_softmax(teacher / (case.teacher_temperature or case.temperature), dim=1)
    log_q = torch.log_softmax(student / case.temperature, dim=1)
    return divergence(case, log_p, log_q), ce


def solve(case: Case) -> Answer:
    """The answer to a case in float64."""
    hidden = case.hidden.double().detach().requires_grad_()
    head = case.head.double().detach().requires_grad_()
    weights = case.token_weights.double()
    kd, ce = ((weights * losses).sum() for losses in token_losses(case, hidden, head))
    factor = case.temperature**2 if case.temperature_squared else 1.0
    total = case.kd_weight * factor * kd + case.ce_weight * ce
    hidden_grad, head_grad = torch.autograd.grad(total, [hidden, head])
    return Answer(total.detach(), kd.detach(), ce.detach(), hidden_grad, head_grad)


def relative(actual: Tensor, expected: Tensor) -> float:
    """The L2 norm of the difference relative to the expected norm; 0 where both are 0."""
    difference = torch.linalg.vector_norm(actual.double() - expected.double()).item()
    norm = torch.linalg.vector_norm(expected.double()).item()
    return difference / norm if norm else difference
