"""The tables of Qwen2, with Qwen2.5 (biases on q, k and v), Qwen3 (norms on q and k) and Qwen3 with experts."""

from __future__ import annotations

from megakd.convert.families.llama import (
    ATTENTION_ROWS,
    NORM_ROWS,
    OUTER_ROWS,
    QKV_BIAS_ROW,
    ROTARY_BUFFERS,
    SHARED_FIELDS,
    SHARED_FIXED,
    SHARED_ONLY,
    SHARED_ROWS,
    H,
    M,
)
from megakd.convert.mappings import Direct, GatedMLP
from megakd.convert.table import ConfigKey, Family, Row

_FIELDS = SHARED_FIELDS | {
    "num_query_groups": ConfigKey(("num_key_value_heads",), 32, null=True),
    "max_position_embeddings": ConfigKey(("max_position_embeddings",), 32768),
}
# A window in some layers only is not expressed.
_ONLY = SHARED_ONLY | {"use_sliding_window": (False,)}

QWEN2 = Family(
    model_type="qwen2",
    model_class="Qwen2ForCausalLM",
    fields=_FIELDS,
    fixed=SHARED_FIXED | {"add_qkv_bias": True},
    only=_ONLY,
    rows=(*SHARED_ROWS, QKV_BIAS_ROW),
    ignored=ROTARY_BUFFERS,
)

_HEAD_NORMS = (
    Row(M + "self_attention.q_layernorm.weight", (H + "self_attn.q_norm.weight",), Direct()),
    Row(M + "self_attention.k_layernorm.weight", (H + "self_attn.k_norm.weight",), Direct()),
)

QWEN3 = Family(
    model_type="qwen3",
    model_class="Qwen3ForCausalLM",
    fields=_FIELDS | {"kv_channels": ConfigKey(("head_dim",), 128, null=True)},
    fixed=SHARED_FIXED | {"qk_layernorm": True},
    only=_ONLY | {"attention_bias": (False,)},
    rows=(*SHARED_ROWS, *_HEAD_NORMS),
    ignored=ROTARY_BUFFERS,
)

_OURS, _THEIRS = M + "mlp.experts.{e}.", H + "mlp.experts.{e}."

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    model_class="Qwen3MoeForCausalLM",
    fields=_FIELDS
    | {
        "num_query_groups": ConfigKey(("num_key_value_heads",), 4, null=True),
        "num_moe_experts": ConfigKey(("num_local_experts",), 128, aliases=("num_experts",), writes_aliases=True),
        "moe_ffn_hidden_size": ConfigKey(("moe_intermediate_size",), 768),
        "moe_router_topk": ConfigKey(("num_experts_per_tok",), 8),
        "moe_router_pre_softmax": ConfigKey(("norm_topk_prob",), False, words={True: False, False: True}),
    },
    fixed={field: value for field, value in SHARED_FIXED.items() if field != "num_moe_experts"}
    | {"qk_layernorm": True},
    # Layers without experts among those with them are not expressed.
    only=_ONLY | {"attention_bias": (False,), "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
    rows=(
        *OUTER_ROWS,
        *NORM_ROWS,
        *ATTENTION_ROWS,
        *_HEAD_NORMS,
        Row(M + "mlp.router.weight", (H + "mlp.gate.weight",), Direct()),
        Row(_OURS + "linear_fc1.weight", (_THEIRS + "gate_proj.weight", _THEIRS + "up_proj.weight"), GatedMLP()),
        Row(_OURS + "linear_fc2.weight", (_THEIRS + "down_proj.weight",), Direct()),
    ),
)
