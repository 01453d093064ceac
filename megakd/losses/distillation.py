"""The distillation loss from hidden states: both models' logits exist only a chunk of rows at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megakd.losses.inputs import LossInputs, build_inputs
from megakd.losses.products import add_head_gradient_, project_back_
from megakd.losses.shards import reduce_hidden_gradient
from megakd.losses.signals import DenseSignal, LossSums, SparseSignal
from megakd.losses.work import build_work

_SAME_SCALE = 1e-5


def distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    signal: DenseSignal | SparseSignal | None,
    *,
    kd_weight: float,
    ce_weight: float,
    vocab_size: int,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    temperature_squared: bool = True,
    divergence: str = "forward_kl",
    jsd_beta: float | None = None,
    skew_alpha: float | None = None,
    student_logit_scale: float = 1.0,
    student_logit_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_logit_softcap: float | None = None,
    tp_group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_mib: int | None = None,
    main_grad: Tensor | None = None,
    grad_scale: float = 1.0,
) -> LossSums:
    """Token-weighted sums of the divergence from the teacher and of the cross-entropy, with their gradients.

    total = kd_weight * T^2 * kd + ce_weight * ce; a forward KL has the teacher's entropy taken off, so that equal
    models score 0. Both gradients are computed while the logits of a chunk exist (the fused linear cross-entropy of
    Hsu et al., arXiv 2410.10989, extended to two models and a sharded vocabulary), and backward only scales them.

    student_hidden: [n, h], or [n/tp, h] under `sequence_parallel`; n = s * b rows in (s, b) order.
    student_head: [v/tp, h], this rank's rows of the padded vocabulary.
    labels, token_weights: [n] on every rank, weights finite and at least 0. A weight of 0 hides its token, whose label,
        hidden states and probabilities may be anything, NaN too. No gradient flows to the weights or to the teacher.
    signal: the teacher's side: its hidden states and head, or k ids per token with their probabilities (forward_kl
        only); None for the cross-entropy alone, which wants kd_weight 0.
    vocab_size: ids that exist, the smaller of the two models' vocab_size; columns beyond take part in nothing.
    temperature: divides both models' logits in the divergence; the cross-entropy is at temperature 1.
    teacher_temperature: the teacher's where it differs; the student's takes part in the gradients and in T^2.
    divergence: forward_kl, reverse_kl, jsd, skew_forward_kl, skew_reverse_kl or tvd; docs/losses.md has the formulas.
    jsd_beta: the teacher's share of jsd's mixture, 0.5 where not given; skew_alpha: the teacher's in skew_forward_kl
        and the student's in skew_reverse_kl, 0.1 where not given. No effect on another divergence.
    student_logit_scale, student_logit_softcap, and the teacher's: the model's logits are
        softcap * tanh(scale * hidden head^T / softcap), or scale * hidden head^T where softcap is None.
    chunk_mib: memory for a chunk of both models' logits, see `chunk_rows`.
    main_grad: [v/tp, h] buffer, fp32 in training. The head's gradient times `grad_scale` is added to it here, in
        forward; backward then sets `student_head.grad_added_to_main_grad` and hands out a gradient without meaning
        (zeros where the weight's `zero_out_wgrad` is set). `grad_scale` must be the gradient that arrives at `total`
        in backward, which is checked on CPU and not on GPU, where it would wait for the device. Without `main_grad`
        `grad_scale` has no effect.

    Raises ValueError for shapes, types and settings that do not fit, for a label outside the vocabulary whose weight
    is not 0 and for a weight below 0 (asynchronous device assertions on GPU).
    """
    inputs = build_inputs(
        student_hidden,
        student_head,
        labels,
        token_weights,
        signal,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        vocab_size=vocab_size,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        temperature_squared=temperature_squared,
        divergence=divergence,
        jsd_beta=jsd_beta,
        skew_alpha=skew_alpha,
        student_logit_scale=student_logit_scale,
        student_logit_softcap=student_logit_softcap,
        teacher_logit_scale=teacher_logit_scale,
        teacher_logit_softcap=teacher_logit_softcap,
        tp_group=tp_group,
        sequence_parallel=sequence_parallel,
        chunk_mib=chunk_mib,
    )
    if main_grad is not None:
        if main_grad.shape != student_head.shape:
            raise ValueError(
                f"main_grad is {list(main_grad.shape)}; it must be {list(student_head.shape)}, as the head."
            )
        if main_grad.dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise ValueError(f"main_grad is {main_grad.dtype}; it must be float32, float64 or bfloat16.")
    wanted = _Wanted(
        hidden=torch.is_grad_enabled() and student_hidden.requires_grad,
        head=torch.is_grad_enabled() and student_head.requires_grad,
        main_grad=main_grad,
        grad_scale=grad_scale,
    )
    total, kd, ce = _FusedLoss.apply(student_hidden, student_head, inputs, wanted)  # type: ignore[no-untyped-call]
    return LossSums(total, kd, ce, torch.count_nonzero(token_weights), token_weights.sum(dtype=torch.float64))


@dataclass(frozen=True)
class _Wanted:
    """Which gradients to compute, and where the head's goes."""

    hidden: bool
    head: bool
    main_grad: Tensor | None
    grad_scale: float


class _FusedLoss(torch.autograd.Function):
    """Computes sums and gradients in forward; backward scales the gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, inputs: LossInputs, wanted: _Wanted
    ) -> tuple[Tensor, Tensor, Tensor]:
        kd, ce, hidden_gradient, head_gradient = _run_chunks(inputs, hidden, head, wanted)
        total = inputs.kd_factor * kd + inputs.objective.ce_weight * ce
        ctx.save_for_backward(hidden_gradient, None if wanted.main_grad is not None else head_gradient)
        ctx.wanted, ctx.head_dtype = wanted, head.dtype
        ctx.head = head if wanted.head and wanted.main_grad is not None else None
        ctx.mark_non_differentiable(kd, ce)
        return total, kd, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_gradient, head_gradient = ctx.saved_tensors
        if hidden_gradient is not None:
            hidden_gradient = _scaled(hidden_gradient, gradient)
        if head_gradient is not None:
            head_gradient = _scaled(head_gradient, gradient).to(ctx.head_dtype)
        elif ctx.head is not None:
            head_gradient = _stand_in_gradient(ctx.head, gradient, ctx.wanted.grad_scale)
        return hidden_gradient, head_gradient, None, None


def _run_chunks(
    inputs: LossInputs, hidden: Tensor, head: Tensor, wanted: _Wanted
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Sums of kd and ce, the gradient of `hidden` as it came, and the head's (all of main_grad where given)."""
    count = inputs.labels.shape[0]
    rows_hidden, rows_head = inputs.rows(hidden), head.detach()
    work = build_work(inputs, rows_hidden, rows_head)
    weights = inputs.token_weights.to(inputs.dtype)
    dtype = inputs.dtype
    sums = torch.zeros(2, dtype=dtype, device=hidden.device)
    hidden_gradient = torch.empty_like(rows_hidden, dtype=dtype) if wanted.hidden else None
    head_gradient = wanted.main_grad if wanted.head else None
    if wanted.head and head_gradient is None:
        head_gradient = torch.empty_like(head, dtype=dtype) if count else torch.zeros_like(head, dtype=dtype)
    scale = 1.0 if wanted.main_grad is None else wanted.grad_scale

    for part in inputs.chunks():
        kd, ce, gradient = work.run(part, wanted.hidden or wanted.head)
        sums += torch.stack([kd, ce]) @ weights[part]
        if gradient is None:
            continue
        # Weights are folded into rows of the narrow sides of both products, not into logits.
        weight = weights[part].unsqueeze(1)
        if hidden_gradient is not None:
            project_back_(hidden_gradient[part], gradient, rows_head)
            hidden_gradient[part].mul_(weight)
        if head_gradient is not None:
            overwrite = wanted.main_grad is None and part.start == 0
            add_head_gradient_(head_gradient, gradient, rows_hidden[part], weight * scale, overwrite=overwrite)

    if hidden_gradient is not None:
        hidden_gradient = reduce_hidden_gradient(
            hidden_gradient, inputs.objective.shard.group, inputs.sequence_parallel
        )
        hidden_gradient = hidden_gradient.to(hidden.dtype)
    # Copies, since an autograd function may not return two views of one tensor.
    return sums[0].clone(), sums[1].clone(), hidden_gradient, head_gradient


def _scaled(saved: Tensor, gradient: Tensor) -> Tensor:
    """saved * gradient, without a copy of a head's size where the host knows that the gradient is 1."""
    if not gradient.is_cuda and gradient.item() == 1.0:
        return saved
    return saved * gradient.to(saved.dtype)


def _stand_in_gradient(head: Tensor, gradient: Tensor, grad_scale: float) -> Tensor:
    """What autograd passes on for a head whose gradient is already in its main_grad."""
    # One is a tensor's number and may be rounded several times on its way, the other is Python's.
    if not gradient.is_cuda and not math.isclose(gradient.item(), grad_scale, rel_tol=_SAME_SCALE):
        raise ValueError(
            f"The gradient that arrives at the loss is {gradient.item()}, but main_grad was filled in forward with "
            f"grad_scale {grad_scale}; they must be equal. Pass that gradient as grad_scale."
        )
    head.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    # Megatron-core's protocol: a tied embedding adds to this gradient, an untied head's is never read.
    return torch.zeros_like(head) if getattr(head, "zero_out_wgrad", False) else torch.empty_like(head)
