"""The table of Llama (1 to 3.x; Hugging Face's LlamaForCausalLM)."""

from __future__ import annotations

from megakd.convert.mappings import Direct, GatedMLP, GroupedQKV, Vocabulary
from megakd.convert.table import ConfigKey, Family, Row

_M, _H = "decoder.layers.{i}.", "model.layers.{i}."


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"{_H}self_attn.{part}_proj.{kind}" for part in "qkv")


def _gate_up(kind: str) -> tuple[str, ...]:
    return f"{_H}mlp.gate_proj.{kind}", f"{_H}mlp.up_proj.{kind}"


LLAMA = Family(
    model_type="llama",
    model_class="LlamaForCausalLM",
    fields={
        "num_layers": ConfigKey(("num_hidden_layers",)),
        "hidden_size": ConfigKey(("hidden_size",)),
        "ffn_hidden_size": ConfigKey(("intermediate_size",)),
        "num_attention_heads": ConfigKey(("num_attention_heads",)),
        "vocab_size": ConfigKey(("vocab_size",)),
        "max_position_embeddings": ConfigKey(("max_position_embeddings",), 2048),
        "layernorm_epsilon": ConfigKey(("rms_norm_eps",), 1e-6),
        "init_method_std": ConfigKey(("initializer_range",), 0.02),
        "share_embeddings_and_output_weights": ConfigKey(("tie_word_embeddings",), False),
        # megatron-core's add_bias_linear puts a bias on every linear layer, so the two keys must agree.
        "add_bias_linear": ConfigKey(("attention_bias", "mlp_bias"), False),
    },
    fixed={
        "normalization": "RMSNorm",
        "activation": "swiglu",
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "position_embedding_type": "rope",
    },
    only={"hidden_act": "silu", "quantization_config": None},
    rows=(
        Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocabulary()),
        Row(_M + "self_attention.linear_qkv.layer_norm_weight", (_H + "input_layernorm.weight",), Direct()),
        Row(_M + "self_attention.linear_qkv.weight", _qkv("weight"), GroupedQKV()),
        Row(_M + "self_attention.linear_qkv.bias", _qkv("bias"), GroupedQKV()),
        Row(_M + "self_attention.linear_proj.weight", (_H + "self_attn.o_proj.weight",), Direct()),
        Row(_M + "self_attention.linear_proj.bias", (_H + "self_attn.o_proj.bias",), Direct()),
        Row(_M + "mlp.linear_fc1.layer_norm_weight", (_H + "post_attention_layernorm.weight",), Direct()),
        Row(_M + "mlp.linear_fc1.weight", _gate_up("weight"), GatedMLP()),
        Row(_M + "mlp.linear_fc1.bias", _gate_up("bias"), GatedMLP()),
        Row(_M + "mlp.linear_fc2.weight", (_H + "mlp.down_proj.weight",), Direct()),
        Row(_M + "mlp.linear_fc2.bias", (_H + "mlp.down_proj.bias",), Direct()),
        Row("decoder.final_layernorm.weight", ("model.norm.weight",), Direct()),
        Row("output_layer.weight", ("lm_head.weight",), Vocabulary()),
    ),
    ignored=(_H + "self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
    heads_divide_hidden_size=True,
)
