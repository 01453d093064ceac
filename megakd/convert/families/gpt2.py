"""The table of GPT-2 (Hugging Face's GPT2LMHeadModel): learned positions, LayerNorm, biases, weights [in, out]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megakd.convert.mappings import Direct, GroupedQKV, Vocabulary
from megakd.convert.table import ConfigKey, Family, Row

_M, _H = "decoder.layers.{i}.", "transformer.h.{i}."
_CONV1D = Direct(transposed=True)


def _four_times_hidden_size(found: Mapping[str, Any]) -> int:
    hidden = found["hidden_size"]
    # What is no number is refused with its own name.
    return 4 * hidden if isinstance(hidden, int) else 1


def _norm(ours: str, theirs: str) -> tuple[Row, Row]:
    return Row(ours + "weight", (theirs + "weight",), Direct()), Row(ours + "bias", (theirs + "bias",), Direct())


def _linear(ours: str, theirs: str) -> tuple[Row, Row]:
    return Row(ours + "weight", (theirs + "weight",), _CONV1D), Row(ours + "bias", (theirs + "bias",), _CONV1D)


GPT2 = Family(
    model_type="gpt2",
    model_class="GPT2LMHeadModel",
    fields={
        "num_layers": ConfigKey(("n_layer",), aliases=("num_hidden_layers",)),
        "hidden_size": ConfigKey(("n_embd",), aliases=("hidden_size",)),
        "ffn_hidden_size": ConfigKey(("n_inner",), _four_times_hidden_size),
        "num_attention_heads": ConfigKey(("n_head",), aliases=("num_attention_heads",)),
        "vocab_size": ConfigKey(("vocab_size",)),
        "max_position_embeddings": ConfigKey(("n_positions",), 1024, aliases=("max_position_embeddings",)),
        "layernorm_epsilon": ConfigKey(("layer_norm_epsilon",), 1e-5),
        "init_method_std": ConfigKey(("initializer_range",), 0.02),
        "share_embeddings_and_output_weights": ConfigKey(("tie_word_embeddings",), True),
        "activation": ConfigKey(("activation_function",), "gelu_new", words={"gelu_tanh": "gelu_new", "gelu": "gelu"}),
    },
    fixed={
        "normalization": "LayerNorm",
        "add_bias_linear": True,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "position_embedding_type": "learned_absolute",
        "sliding_window": None,
        "num_moe_experts": None,
    },
    only={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    rows=(
        Row("embedding.word_embeddings.weight", ("transformer.wte.weight",), Vocabulary()),
        Row("embedding.position_embeddings.weight", ("transformer.wpe.weight",), Direct()),
        *_norm(_M + "self_attention.linear_qkv.layer_norm_", _H + "ln_1."),
        *(
            Row(f"{_M}self_attention.linear_qkv.{kind}", (f"{_H}attn.c_attn.{kind}",), GroupedQKV(True, fused=True))
            for kind in ("weight", "bias")
        ),
        *_linear(_M + "self_attention.linear_proj.", _H + "attn.c_proj."),
        *_norm(_M + "mlp.linear_fc1.layer_norm_", _H + "ln_2."),
        *_linear(_M + "mlp.linear_fc1.", _H + "mlp.c_fc."),
        *_linear(_M + "mlp.linear_fc2.", _H + "mlp.c_proj."),
        *_norm("decoder.final_layernorm.", "transformer.ln_f."),
        Row("output_layer.weight", ("lm_head.weight",), Vocabulary()),
    ),
    ignored=(_H + "attn.bias", _H + "attn.masked_bias"),
    base_prefix="transformer.",
    heads_divide_hidden_size=True,
)
