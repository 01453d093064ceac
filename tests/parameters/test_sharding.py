from __future__ import annotations

import pytest
import torch

from megakd.config.architecture import GPTArchitecture
from megakd.parameters.shapes import padded_vocab_size, parameter_shapes
from megakd.parameters.sharding import Partition, canonical_name, join_shards, joined_shape, shard_of, take_shard

BASE = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 8, "num_query_groups": 4}
VARIANTS = {
    "llama": {},
    "tied": {"share_embeddings_and_output_weights": True},
    "biases": {"add_bias_linear": True},
    "qkv_bias_and_norms": {"add_qkv_bias": True, "qk_layernorm": True, "kv_channels": 16},
    "gpt": {
        "normalization": "LayerNorm",
        "activation": "gelu",
        "add_bias_linear": True,
        "position_embedding_type": "learned_absolute",
    },
}


def architecture(**overrides: object) -> GPTArchitecture:
    return GPTArchitecture(**(BASE | {"vocab_size": 100, "max_position_embeddings": 64} | overrides))  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_shards_join_to_the_full_parameter(variant: str, tp_size: int) -> None:
    model = architecture(**VARIANTS[variant])
    for name, shape in parameter_shapes(model, divisible_by=128).items():
        full, partition = torch.randn(shape), shard_of(name, model)
        shards = [take_shard(full, partition, rank, tp_size) for rank in range(tp_size)]
        assert torch.equal(join_shards(shards, partition), full), name
        assert joined_shape(shards[0].shape, partition, tp_size) == shape
        replicated = "norm" in name or "position" in name or name.endswith(("proj.bias", "fc2.bias"))
        assert shards[0].numel() == full.numel() // (1 if replicated else tp_size), name


def test_a_gated_rank_holds_its_rows_of_both_halves() -> None:
    gate, up = torch.arange(4.0), torch.arange(10.0, 14.0)
    shard = take_shard(torch.cat([gate, up]), Partition.GATED_ROWS, 1, 2)
    assert shard.tolist() == [2, 3, 12, 13]


def test_a_dimension_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="a dimension of 6 does not divide over 4 tensor-parallel ranks"):
        take_shard(torch.zeros(6, 2), Partition.ROWS, 0, 4)


def test_padding_rounds_up() -> None:
    assert [padded_vocab_size(size, 128) for size in (1, 128, 129)] == [128, 128, 256]


@pytest.mark.parametrize(
    ("module_name", "expected"),
    [
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("module.module.output_layer.weight", "output_layer.weight"),
        ("module.decoder.layers.1.mlp.linear_fc2.weight", "decoder.layers.13.mlp.linear_fc2.weight"),
        ("decoder.layers.0.input_layernorm.bias", "decoder.layers.12.self_attention.linear_qkv.layer_norm_bias"),
        ("decoder.layers.0.pre_mlp_layernorm.weight", "decoder.layers.12.mlp.linear_fc1.layer_norm_weight"),
        (
            "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
            "decoder.layers.12.self_attention.linear_qkv.layer_norm_weight",
        ),
        ("decoder.layers.0.self_attention.q_layernorm.weight", "decoder.layers.12.self_attention.q_layernorm.weight"),
        ("decoder.final_layernorm.weight", "decoder.final_layernorm.weight"),
    ],
)
def test_canonical_names(module_name: str, expected: str) -> None:
    assert canonical_name(module_name, 12) == expected
