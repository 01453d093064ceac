"""What the kernels compute per element; every value is fp32.

tl has neither tanh nor log1p, and libdevice's do not run in Triton's interpreter, so both are written out here.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def tanh(x: tl.tensor) -> tl.tensor:
    """tanh x within 2 units in the last place: Lambert's continued fraction below 1, from e^(-2|x|) above."""
    square = x * x
    fraction = x * (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + square * 15.0))
    decay = tl.exp(-2.0 * tl.abs(x))
    tail = (1.0 - decay) / (1.0 + decay)
    # The fraction may overflow to NaN where it is not chosen.
    return tl.where(square < 1.0, fraction, tl.where(x < 0.0, -tail, tail))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def tanh_slope(x: tl.tensor) -> tl.tensor:
    """1 - tanh^2 x as 4 e / (1 + e)^2 with e = e^(-2|x|), which does not cancel where the tanh saturates."""
    decay = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * decay / ((1.0 + decay) * (1.0 + decay))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def log1p_fraction(y: tl.tensor) -> tl.tensor:
    """ln(1 + y) for y in [0, 1] as 2 artanh r with r = y / (2 + y) <= 1/3: the first term left out is 1.4e-8 of it."""
    r = y / (2.0 + y)
    s = r * r
    series = 1.0 / 9.0 + s * (1.0 / 11.0 + s * (1.0 / 13.0))
    series = 1.0 + s * (1.0 / 3.0 + s * (1.0 / 5.0 + s * (1.0 / 7.0 + s * series)))
    return 2.0 * r * series


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def load_logits(
    pointer: tl.tensor, columns: tl.tensor, width: tl.tensor, inner: tl.tensor, cap: tl.tensor, CAPPED: tl.constexpr
) -> tl.tensor:
    """Logits of the columns of one row: cap * tanh(inner * product), or inner * product.

    Loads are masked by the width alone, in which 16-byte accesses stay possible whatever the vocabulary's size: what
    a padded column holds is for the caller to drop.
    """
    logits = inner * tl.load(pointer + columns, mask=columns < width, other=0.0)
    if CAPPED:
        logits = cap * tanh(logits)
    return logits


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def mixture_terms(
    t: tl.tensor,
    p: tl.tensor,
    q: tl.tensor,
    share: tl.tensor,
    other: tl.tensor,
    log_share: tl.tensor,
    log_other: tl.tensor,
    FORMULA: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """(loss, h) of one element, see `Divergence`; t = ln p - ln q, and the mixture is m = share p + other q.

    For jsd `loss` is the teacher's half alone, p (ln p - ln m): the student's is q h, which the caller sums anyway.
    With s = ln(share p) - ln(other q) and l = ln(1 + e^-|s|): ln p - ln m = min(s, 0) - l - ln share and
    ln q - ln m = -max(s, 0) - l - ln other, which keep the digits that a large ln p or ln q would cost.
    """
    if FORMULA == "tvd":
        loss = 0.5 * tl.abs(q - p)
        h = tl.where(t > 0.0, -0.5, tl.where(t < 0.0, 0.5, 0.0))
    else:
        s = t + (log_share - log_other)
        rest = log1p_fraction(tl.exp(-tl.abs(s)))
        teacher_ratio = tl.minimum(s, 0.0) - (rest + log_share)
        student_ratio = -(tl.maximum(s, 0.0) + (rest + log_other))
        if FORMULA == "jsd":
            h = other * student_ratio
            loss = p * teacher_ratio
        elif FORMULA == "skew_forward_kl":
            loss = p * teacher_ratio
            h = -other * tl.exp(teacher_ratio)
        else:
            tl.static_assert(FORMULA == "skew_reverse_kl")
            loss = q * student_ratio
            h = student_ratio - other * tl.exp(student_ratio)
    return loss, h
