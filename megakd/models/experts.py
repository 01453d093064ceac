"""The router of a layer with experts, on plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class Router(TopKRouter):
    """megatron-core's router, whose own product needs a name that is there with Transformer Engine only."""

    def gating(self, input: Tensor) -> Tensor:
        """Logits [s, b, experts] of hidden states [s, b, h]."""
        return F.linear(input, self.weight)
