"""What a model does to the product of its hidden state and its head before the softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitForm:
    """logits = softcap * tanh(scale * product / softcap), or scale * product without a softcap."""

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, product: Tensor) -> None:
        """Turn products [c, v/tp] into logits, in place."""
        if self.softcap is None:
            if self.scale != 1.0:
                product.mul_(self.scale)
        else:
            product.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)

    def softcap_slope(self, logits: Tensor, factor: float, offset: Tensor, out: Tensor) -> Tensor:
        """d logits / d (scale * product) from stored x with logits = factor * x + offset; offset [r, 1]."""
        assert self.softcap is not None
        torch.add(offset, logits, alpha=factor, out=out).mul_(1.0 / self.softcap)
        # Masked columns hold a huge sentinel, whose square would be infinite.
        return out.clamp_(-1.0, 1.0).square_().neg_().add_(1.0)


def build_logit_form(model: str, scale: float, softcap: float | None) -> LogitForm:
    """Check the two settings of `model`, student or teacher; raises ValueError."""
    if not 0.0 < scale < float("inf"):
        raise ValueError(f"{model}_logit_scale is {scale}; it must be > 0. Use 1.0 to leave the logits unscaled.")
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise ValueError(f"{model}_logit_softcap is {softcap}; it must be > 0. Use None to leave the logits uncapped.")
    return LogitForm(scale, softcap)
