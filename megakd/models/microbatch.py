"""A microbatch through one stage of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


def run_stage(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """What the stage returns for a microbatch.

    Args:
        batch: tokens and position_ids [b, s]; with cu_seqlens int32 [n + 1] and max_seqlen [], b is 1 and tokens
            attend within their segment only, where rotary positions begin again at 0.
    """
    if "cu_seqlens" not in batch:
        return model(batch["tokens"], batch["position_ids"], None)
    ends, longest = batch["cu_seqlens"], int(batch["max_seqlen"])
    packing = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    return model(batch["tokens"], batch["position_ids"], None, packed_seq_params=packing)
