"""Losses against a few known ids from their definitions: whole vocabulary, float64, plain autograd, one process."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from megakd.losses import SparseSignal
from tests.losses.reference import Answer, Case


def teacher_probabilities(case: Case) -> Tensor:
    """softmax(u/T), [n, v], in float64."""
    assert case.teacher_hidden is not None and case.teacher_head is not None
    logits = case.teacher_hidden.double() @ case.teacher_head.double().T[:, : case.vocab_size]
    return (logits / case.temperature).softmax(1)


def make_signal(case: Case, mode: str, k: int, seed: int = 0, *, entropy: bool = False) -> SparseSignal:
    """The case's teacher as k ids per row: the likeliest ones, or the distinct ids of k draws, in mixed slots."""
    generator = torch.Generator().manual_seed(seed)
    p = teacher_probabilities(case)
    if mode == "sampled":
        draws = torch.multinomial(p, k, replacement=True, generator=generator)
        counts = torch.zeros_like(p).scatter_add_(1, draws, torch.ones_like(draws, dtype=p.dtype))
        frequencies, ids = counts.topk(k, dim=1)
        ids = torch.where(frequencies > 0, ids, -1)
        values = torch.where(frequencies > 0, frequencies / k, 0.3)  # what stands in an empty slot does not count
    else:
        values, ids = p.topk(k, dim=1)
    order = torch.rand(ids.shape, generator=generator).argsort(1)
    h = -torch.xlogy(p, p).sum(1) if entropy else None
    return SparseSignal(ids.gather(1, order), values.gather(1, order).to(case.hidden.dtype), mode, h)


def sparse_token_losses(case: Case, signal: SparseSignal, hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """kd and ce of each token, [n]."""
    logits = case.student_logit_scale * (hidden @ head.T[:, : case.vocab_size])
    if case.student_logit_softcap is not None:
        logits = case.student_logit_softcap * torch.tanh(logits / case.student_logit_softcap)
    ce = -logits.log_softmax(1).gather(1, case.labels.clamp(min=0)[:, None])[:, 0]
    log_q = (logits / case.temperature).log_softmax(1)
    kd = [_row(log_q[i], signal, i) for i in range(len(log_q))]
    return torch.stack(kd), ce


def _row(log_q: Tensor, signal: SparseSignal, i: int) -> Tensor:
    present = signal.ids[i] >= 0
    ids, p = signal.ids[i][present], signal.probabilities[i][present].double()
    if signal.mode == "renormalised":
        p = p / p.sum()
    entropy = -torch.xlogy(p, p).sum() if signal.entropy is None else signal.entropy[i]
    loss = -(p * log_q[ids]).sum() - entropy
    outside = torch.ones_like(log_q, dtype=torch.bool)
    outside[ids] = False
    tail = 1.0 - p.sum()
    if signal.mode == "tail_bucket" and tail > 0 and outside.any():
        loss = loss + tail * (tail.log() - log_q[outside].logsumexp(0))
    return loss


def solve_sparse(case: Case, signal: SparseSignal) -> Answer:
    """The answer to a case in float64."""
    hidden = case.hidden.double().detach().requires_grad_()
    head = case.head.double().detach().requires_grad_()
    weights = case.token_weights.double()
    kd, ce = ((weights * losses).sum() for losses in sparse_token_losses(case, signal, hidden, head))
    factor = case.temperature**2 if case.temperature_squared else 1.0
    total = case.kd_weight * factor * kd + case.ce_weight * ce
    gradients = torch.autograd.grad(total, [hidden, head])
    return Answer(total.detach(), kd.detach(), ce.detach(), *gradients)


def without_teacher(case: Case) -> Case:
    """The student's side alone."""
    return dataclasses.replace(case, teacher_hidden=None, teacher_head=None)
