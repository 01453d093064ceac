"""RMSNorm and LayerNorm for the local layer spec, with what sequence parallelism asks of their parameters."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class _SequenceParallelNorm(torch.nn.Module):
    """Holds a norm's parameters; `sequence_parallel` tells megatron-core to sum their gradients over tensor ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype, device=device))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class RMSNorm(_SequenceParallelNorm):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., h]."""
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(_SequenceParallelNorm):
    """(x - mean) / std * weight + bias over the last dimension (Ba et al. 2016, arXiv 1607.06450)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., h]."""
        return torch.nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def norm_class(normalization: str) -> type[_SequenceParallelNorm]:
    """The norm of this name."""
    return {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}[normalization]
