"""The matrix products between hidden states, heads and logits, with results in the compute dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def project_(logits: Tensor, hidden: Tensor, head: Tensor) -> None:
    """logits [c, v/tp] = hidden [c, h] head^T, where head is [v/tp, h]."""
    _product_(logits, hidden, head.t())


def project_back_(hidden_gradient: Tensor, logits_gradient: Tensor, head: Tensor) -> None:
    """hidden_gradient [c, h] = logits_gradient [c, v/tp] head [v/tp, h]."""
    _product_(hidden_gradient, logits_gradient.to(head.dtype), head)


def add_head_gradient_(
    head_gradient: Tensor, logits_gradient: Tensor, hidden: Tensor, weight: Tensor, *, overwrite: bool
) -> None:
    """head_gradient [v/tp, h] += logits_gradient^T [v/tp, c] (weight [c, 1] * hidden [c, h]), or = with `overwrite`."""
    beta = 0.0 if overwrite else 1.0  # 0 also ignores what uninitialised memory holds
    dtype = head_gradient.dtype
    if hidden.dtype != dtype and hidden.is_cuda:
        narrow, weighted = logits_gradient.to(hidden.dtype).t(), (weight * hidden).to(hidden.dtype)
        torch.addmm(head_gradient, narrow, weighted, dtype, beta=beta, out=head_gradient)
    else:
        head_gradient.addmm_(logits_gradient.to(dtype).t(), (weight * hidden).to(dtype), beta=beta)


def _product_(out: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif out.is_cuda:
        torch.mm(left, right, out.dtype, out=out)
    else:
        # CPU has no product with a wider result: the product's own rounding is what bf16 costs there.
        out.copy_(torch.mm(left, right))
