"""The tables of Qwen2, with Qwen2.5 (biases on q, k and v), and Qwen3 (norms on q and k)."""

from __future__ import annotations

from megakd.convert.families.llama import (
    QKV_BIAS_ROW,
    ROTARY_BUFFERS,
    SHARED_FIELDS,
    SHARED_FIXED,
    SHARED_ONLY,
    SHARED_ROWS,
    H,
    M,
)
from megakd.convert.mappings import Direct
from megakd.convert.table import ConfigKey, Family, Row

_FIELDS = SHARED_FIELDS | {
    "num_query_groups": ConfigKey(("num_key_value_heads",), 32, null=True),
    "max_position_embeddings": ConfigKey(("max_position_embeddings",), 32768),
}
# A window in some layers only is not expressed.
_ONLY = SHARED_ONLY | {"use_sliding_window": False}

QWEN2 = Family(
    model_type="qwen2",
    model_class="Qwen2ForCausalLM",
    fields=_FIELDS,
    fixed=SHARED_FIXED | {"add_qkv_bias": True},
    only=_ONLY,
    rows=(*SHARED_ROWS, QKV_BIAS_ROW),
    ignored=ROTARY_BUFFERS,
)

QWEN3 = Family(
    model_type="qwen3",
    model_class="Qwen3ForCausalLM",
    fields=_FIELDS | {"kv_channels": ConfigKey(("head_dim",), 128, null=True)},
    fixed=SHARED_FIXED | {"qk_layernorm": True},
    only=_ONLY | {"attention_bias": False},
    rows=(
        *SHARED_ROWS,
        Row(M + "self_attention.q_layernorm.weight", (H + "self_attn.q_norm.weight",), Direct()),
        Row(M + "self_attention.k_layernorm.weight", (H + "self_attn.k_norm.weight",), Direct()),
    ),
    ignored=ROTARY_BUFFERS,
)
