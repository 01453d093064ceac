"""Core attention on torch's scaled_dot_product_attention: flash kernels on GPU, blocked on CPU, no s x s scores."""

from __future__ import annotations

from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def _band(length: int, window: int, device: torch.device) -> Tensor | None:
    """Which of the tokens before it, itself included, each token attends to: bool [s, s]; None where it is all."""
    if length <= window:
        return None
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions
    return (distance >= 0) & (distance < window)


class ScaledDotProductAttention(torch.nn.Module):
    """Causal attention within each sequence of the batch, grouped queries and sliding windows included.

    Raises:
        ValueError: a mask or a bias, which only other cores of attention handle.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        if config.context_parallel_size > 1:
            raise ValueError("context parallelism needs Transformer Engine's attention (run.layer_spec)")
        if attn_mask_type is not AttnMaskType.causal or attention_type != "self":
            raise ValueError(f"the local attention is causal self-attention, not {attn_mask_type} {attention_type}")
        self.softmax_scale = softmax_scale
        self.window = None if config.window_size is None else config.window_size[0] + 1

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, heads/tp, d], or [t, heads/tp, d] where sequences are packed.
            key, value: [s, b, groups/tp, d], or [t, groups/tp, d].
            packed_seq_params: `cu_seqlens_q` says where each packed sequence begins and the last one ends.

        Returns:
            [s, b, heads/tp * d], or [t, heads/tp, d].
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("the local attention takes no mask and no bias")
        if packed_seq_params is None:
            return self._attend(query, key, value)
        ends: list[int] = packed_seq_params.cu_seqlens_q.tolist()
        lengths = [stop - start for start, stop in pairwise(ends)]
        parts = zip(*(x.unsqueeze(1).split(lengths) for x in (query, key, value)), strict=True)
        return torch.cat([self._attend(*part) for part in parts]).view_as(query)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask = None if self.window is None else _band(len(query), self.window, query.device)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
