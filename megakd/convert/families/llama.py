"""The table of Llama (1 to 3.x; Hugging Face's LlamaForCausalLM), and the rows and keys its relatives share."""

from __future__ import annotations

from megakd.convert.mappings import Direct, GatedMLP, GroupedQKV, Vocabulary
from megakd.convert.table import ConfigKey, Family, Row

M, H = "decoder.layers.{i}.", "model.layers.{i}."
"""A layer in megatron-core's names and in Hugging Face's."""


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"{H}self_attn.{part}_proj.{kind}" for part in "qkv")


def _gate_up(kind: str) -> tuple[str, ...]:
    return f"{H}mlp.gate_proj.{kind}", f"{H}mlp.up_proj.{kind}"


SHARED_FIELDS = {
    "num_layers": ConfigKey(("num_hidden_layers",)),
    "hidden_size": ConfigKey(("hidden_size",)),
    "ffn_hidden_size": ConfigKey(("intermediate_size",)),
    "num_attention_heads": ConfigKey(("num_attention_heads",)),
    "num_query_groups": ConfigKey(("num_key_value_heads",), null=True),
    "kv_channels": ConfigKey(("head_dim",), null=True),
    "vocab_size": ConfigKey(("vocab_size",)),
    "layernorm_epsilon": ConfigKey(("rms_norm_eps",), 1e-6),
    "init_method_std": ConfigKey(("initializer_range",), 0.02),
    "share_embeddings_and_output_weights": ConfigKey(("tie_word_embeddings",), False),
}
SHARED_FIXED = {
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "sliding_window": None,
    "num_moe_experts": None,
}
# Two names of one function.
SHARED_ONLY = {"hidden_act": ("silu", "swish")}
OUTER_ROWS = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocabulary()),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), Direct()),
    Row("output_layer.weight", ("lm_head.weight",), Vocabulary()),
)
NORM_ROWS = (
    Row(M + "self_attention.linear_qkv.layer_norm_weight", (H + "input_layernorm.weight",), Direct()),
    Row(M + "mlp.linear_fc1.layer_norm_weight", (H + "post_attention_layernorm.weight",), Direct()),
)
PROJ_ROW = Row(M + "self_attention.linear_proj.weight", (H + "self_attn.o_proj.weight",), Direct())
ATTENTION_ROWS = (Row(M + "self_attention.linear_qkv.weight", _qkv("weight"), GroupedQKV()), PROJ_ROW)
DOWN_ROW = Row(M + "mlp.linear_fc2.weight", (H + "mlp.down_proj.weight",), Direct())
SHARED_ROWS = (
    *OUTER_ROWS,
    *NORM_ROWS,
    *ATTENTION_ROWS,
    Row(M + "mlp.linear_fc1.weight", _gate_up("weight"), GatedMLP()),
    DOWN_ROW,
)
QKV_BIAS_ROW = Row(M + "self_attention.linear_qkv.bias", _qkv("bias"), GroupedQKV())
ROTARY_BUFFERS = (H + "self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")

LLAMA = Family(
    model_type="llama",
    model_class="LlamaForCausalLM",
    fields=SHARED_FIELDS
    | {
        "max_position_embeddings": ConfigKey(("max_position_embeddings",), 2048),
        # megatron-core's add_bias_linear puts a bias on every linear layer, so the two keys must agree.
        "add_bias_linear": ConfigKey(("attention_bias", "mlp_bias"), False),
    },
    fixed={field: value for field, value in SHARED_FIXED.items() if field != "add_bias_linear"},
    only=SHARED_ONLY,
    rows=(
        *SHARED_ROWS,
        QKV_BIAS_ROW,
        Row(M + "self_attention.linear_proj.bias", (H + "self_attn.o_proj.bias",), Direct()),
        Row(M + "mlp.linear_fc1.bias", _gate_up("bias"), GatedMLP()),
        Row(M + "mlp.linear_fc2.bias", (H + "mlp.down_proj.bias",), Direct()),
    ),
    ignored=ROTARY_BUFFERS,
    heads_divide_hidden_size=True,
)
