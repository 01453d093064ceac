"""The losses from their definitions: whole vocabulary, float64, plain autograd, one process."""

from __future__ import annotations

from dataclasses import dataclass

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
    **settings: float,
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


def token_losses(case: Case, hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """kd and ce of each token [n], from the definitions."""
    student = hidden @ head.T[:, : case.vocab_size]
    log_q1 = torch.log_softmax(student, dim=1)
    ce = -log_q1.gather(1, case.labels.clamp(min=0)[:, None])[:, 0]
    if case.teacher_hidden is None or case.teacher_head is None:
        return torch.zeros_like(ce), ce
    teacher = case.teacher_hidden.double() @ case.teacher_head.double().T[:, : case.vocab_size]
    log_p = torch.log_softmax(teacher / case.temperature, dim=1)
    log_q = torch.log_softmax(student / case.temperature, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(1), ce


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
