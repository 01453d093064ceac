"""Which parameters a model has, by canonical name, with their full shapes. Imports no torch."""

from __future__ import annotations

import math

from megakd.config.architecture import GPTArchitecture

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
POSITION_EMBEDDINGS = "embedding.position_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"


def padded_vocab_size(vocab_size: int, divisible_by: int) -> int:
    """Rows of embedding and output layer over all ranks: the vocabulary rounded up, the same at every layout."""
    return -(-vocab_size // divisible_by) * divisible_by


def parameter_shapes(architecture: GPTArchitecture, divisible_by: int) -> dict[str, tuple[int, ...]]:
    """Full shape of every parameter by canonical name, in the model's order, with the vocabulary padded.

    A tied model has no `output_layer.weight`.
    """
    hidden = architecture.hidden_size
    vocab = padded_vocab_size(architecture.vocab_size, divisible_by)
    shapes: dict[str, tuple[int, ...]] = {WORD_EMBEDDINGS: (vocab, hidden)}
    if architecture.position_embedding_type == "learned_absolute":
        shapes[POSITION_EMBEDDINGS] = (architecture.max_position_embeddings, hidden)
    layer = _layer_shapes(architecture)
    for i in range(architecture.num_layers):
        shapes.update({f"decoder.layers.{i}.{name}": shape for name, shape in layer.items()})
    shapes["decoder.final_layernorm.weight"] = (hidden,)
    if architecture.normalization == "LayerNorm":
        shapes["decoder.final_layernorm.bias"] = (hidden,)
    if not architecture.share_embeddings_and_output_weights:
        shapes[OUTPUT_LAYER] = (vocab, hidden)
    return shapes


def _layer_shapes(architecture: GPTArchitecture) -> dict[str, tuple[int, ...]]:
    hidden, kv_channels = architecture.hidden_size, architecture.kv_channels
    query = architecture.num_attention_heads * kv_channels
    qkv = query + 2 * architecture.num_query_groups * kv_channels
    fc1 = architecture.mlp_width * (2 if architecture.activation == "swiglu" else 1)
    linear_bias, norm_bias = architecture.add_bias_linear, architecture.normalization == "LayerNorm"
    qkv_bias, qk_norm = linear_bias or architecture.add_qkv_bias, architecture.qk_layernorm
    entries: list[tuple[str, tuple[int, ...], bool]] = [
        ("self_attention.linear_qkv.layer_norm_weight", (hidden,), True),
        ("self_attention.linear_qkv.layer_norm_bias", (hidden,), norm_bias),
        ("self_attention.linear_qkv.weight", (qkv, hidden), True),
        ("self_attention.linear_qkv.bias", (qkv,), qkv_bias),
        ("self_attention.q_layernorm.weight", (kv_channels,), qk_norm),
        ("self_attention.q_layernorm.bias", (kv_channels,), qk_norm and norm_bias),
        ("self_attention.k_layernorm.weight", (kv_channels,), qk_norm),
        ("self_attention.k_layernorm.bias", (kv_channels,), qk_norm and norm_bias),
        ("self_attention.linear_proj.weight", (hidden, query), True),
        ("self_attention.linear_proj.bias", (hidden,), linear_bias),
        ("mlp.linear_fc1.layer_norm_weight", (hidden,), True),
        ("mlp.linear_fc1.layer_norm_bias", (hidden,), norm_bias),
    ]
    experts = architecture.num_moe_experts
    if experts is not None:
        entries.append(("mlp.router.weight", (experts, hidden), True))
    for mlp in ["mlp."] if experts is None else [f"mlp.experts.{e}." for e in range(experts)]:
        entries += [
            (mlp + "linear_fc1.weight", (fc1, hidden), True),
            (mlp + "linear_fc1.bias", (fc1,), linear_bias),
            (mlp + "linear_fc2.weight", (hidden, architecture.mlp_width), True),
            (mlp + "linear_fc2.bias", (hidden,), linear_bias),
        ]
    return {name: shape for name, shape, present in entries if present}


def num_parameters(architecture: GPTArchitecture) -> int:
    """Return how many parameters the model has without padding of its vocabulary."""
    return sum(math.prod(shape) for shape in parameter_shapes(architecture, 1).values())
