from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig

from megakd.common.errors import UserError
from megakd.config.architecture import GPTArchitecture, RopeScaling
from megakd.convert import architecture_from_hf, hf_config_from_architecture, read_hf_config

VERSION_4: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.01,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 100,
}
LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def folder(path: Path, **changes: Any) -> Path:
    """VERSION_4 with keys replaced, or taken out by `...`."""
    config = {key: value for key, value in (VERSION_4 | changes).items() if value is not ...}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_version_4(tmp_path: Path) -> None:
    assert architecture_from_hf(folder(tmp_path)) == GPTArchitecture(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=8,
        num_query_groups=2,
        kv_channels=8,
        vocab_size=100,
        max_position_embeddings=256,
        layernorm_epsilon=1e-5,
        rotary_base=500000.0,
        share_embeddings_and_output_weights=True,
        init_method_std=0.01,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": LLAMA_3 | {"rope_type": "llama3"}},
        {"rope_scaling": LLAMA_3 | {"type": "llama3"}},
        {
            "rope_theta": ...,
            "rope_scaling": ...,
            "rope_parameters": LLAMA_3 | {"rope_type": "llama3", "rope_theta": 500000.0},
        },
    ],
)
def test_llama_3_scaling_in_every_spelling(tmp_path: Path, changes: dict[str, Any]) -> None:
    architecture = architecture_from_hf(folder(tmp_path, **changes))
    assert architecture.rope_scaling == RopeScaling(**LLAMA_3)  # type: ignore[arg-type]
    assert architecture.rotary_base == 500000.0


def test_absent_keys_mean_what_transformers_takes_them_for(tmp_path: Path) -> None:
    absent = dict.fromkeys(
        ["num_key_value_heads", "rope_theta", "rope_scaling", "rms_norm_eps", "initializer_range", "hidden_act"], ...
    )
    architecture = architecture_from_hf(
        folder(tmp_path, **absent, tie_word_embeddings=..., max_position_embeddings=...)
    )
    expected = AutoConfig.from_pretrained(tmp_path)
    assert architecture.num_query_groups == expected.num_key_value_heads
    assert architecture.kv_channels == expected.head_dim
    assert architecture.rotary_base == expected.rope_parameters["rope_theta"]
    assert architecture.layernorm_epsilon == expected.rms_norm_eps
    assert architecture.init_method_std == expected.initializer_range
    assert architecture.max_position_embeddings == expected.max_position_embeddings
    assert architecture.share_embeddings_and_output_weights == expected.tie_word_embeddings


def test_both_biases_are_read(tmp_path: Path) -> None:
    assert architecture_from_hf(folder(tmp_path, attention_bias=True, mlp_bias=True)).add_bias_linear


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mamba"},
            "model_type is 'mamba' in .*config.json; the architectures that can be read are: "
            "llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, phi3, gpt2",
        ),
        ({"model_type": ...}, "model_type is None in"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu" in .*; only "silu" is supported for llama'),
        ({"quantization_config": {"bits": 4}}, 'quantization_config is {"bits": 4} in .*; only null'),
        ({"attention_bias": True}, "attention_bias is true and mlp_bias is false in .* only where they are equal"),
        ({"rope_scaling": {"rope_type": "yarn"}}, 'rope_scaling.rope_type is "yarn" in .*; only default and llama3'),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_scaling.rope_type is "linear"'),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor is null in .*; rope_type llama3 needs"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5 in .*; llama turns whole heads only"),
        ({"num_hidden_layers": ...}, "has no num_hidden_layers, which a llama model needs"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(8\) must be a multiple of num_query_groups \(3\)"),
        ({"hidden_size": "wide"}, 'hidden_size is "wide" in .*; it must be a valid integer'),
        ({"hidden_size": "64"}, 'hidden_size is "64" in .*; it must be a valid integer'),
        ({"num_hidden_layers": True}, "num_hidden_layers is true in .*; it must be a valid integer"),
        ({"num_hidden_layers": {"a": 1}}, "num_hidden_layers is .* it must be a valid integer"),
        ({"hidden_size": 10**400}, r"hidden_size is 1000.*\.\.\. in .*; it must be at most 9223372036854775807"),
        ({"vocab_size": 1e400}, "vocab_size is Infinity in .*; it must be a "),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN in .*; it must be a finite number"),
        ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings is "yes" in .*; it must be a valid boolean'),
        ({"attention_bias": float("nan")}, "attention_bias is NaN and mlp_bias is false"),
        ({"rope_theta": "abc"}, 'rope_theta is "abc" in .*; it must be a finite number above 0'),
        ({"rope_theta": float("inf")}, "rope_theta is Infinity"),
        ({"rope_theta": 10**400}, r"rope_theta is 1000.*\.\.\. in .*; it must be a finite number above 0"),
        ({"rope_theta": True}, "rope_theta is true"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"partial_rotary_factor": [1]}, r"partial_rotary_factor is \[1\] in .*; it must be a finite number above 0"),
        ({"rope_scaling": "linear"}, 'rope_scaling is "linear" in .*; it must be an object'),
        (
            {"rope_scaling": LLAMA_3 | {"rope_type": "llama3", "factor": float("nan")}},
            "rope_scaling.factor is NaN in .*; rope_type llama3 needs a number above 0",
        ),
        (
            {"rope_scaling": LLAMA_3 | {"rope_type": "llama3", "original_max_position_embeddings": 6.5}},
            "rope_scaling.original_max_position_embeddings is 6.5 in .*; it must be a whole number",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
            "rope_parameters.full_attention is .* only one rope for all layers is supported for llama",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            "rope_parameters.rope_theta is 7.0 and rope_theta is 500000.0 in .*; they contradict each other",
        ),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA_3 | {"rope_type": "llama3"}},
            "rope_scaling is .* and rope_parameters is .* in .*; they contradict each other",
        ),
        (
            {"rope_scaling": LLAMA_3 | {"rope_type": "llama3"}, "original_max_position_embeddings": 7},
            "original_max_position_embeddings is 64 and original_max_position_embeddings is 7 in .* contradict",
        ),
        ({"is_causal": False}, "is_causal is false in .*; only true is supported for llama"),
        ({"is_causal": None}, "is_causal is null"),
        ({"per_layer_config": {"1": {"rms_norm_eps": 0.5}}}, "per_layer_config is .* only null is supported"),
        ({"transformers_weights": "other.safetensors"}, 'transformers_weights is "other.safetensors" in'),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is"),
        ({"layer_types": ["sliding_attention"] * 2}, 'llama model with no window is .* "full_attention" in each of'),
        ({"layer_types": ["full_attention"] * 3}, "layer_types is .* in each of its 2 layers"),
        ({"layer_types": "full_attention"}, 'layer_types is "full_attention" in'),
        ({"layer_types": [["full_attention"]] * 2}, "layer_types is"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            r'architectures is \["LlamaForSequenceClassification"\] in .*; only LlamaForCausalLM and LlamaModel are',
        ),
        ({"architectures": ["LlamaBiForMNTP"]}, "architectures is"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is"),
        (
            {"auto_map": {"AutoModelForCausalLM": "modeling_bi.LlamaBiForCausalLM"}},
            'auto_map.AutoModelForCausalLM is "modeling_bi.LlamaBiForCausalLM" in .* never run. Only LlamaForCausalLM',
        ),
        ({"auto_map": {"AutoModel": ["modeling_bi.A"]}}, "auto_map.AutoModel is"),
        ({"auto_map": "modeling.A"}, 'auto_map is "modeling.A" in .*; it must be an object'),
        ({"eos_token_id": ["a"]}, r'eos_token_id is \["a"\] in .*; it must be a token id, a list of them or null'),
        ({"pad_token_id": True}, "pad_token_id is true"),
        ({"bos_token_id": 1.5}, "bos_token_id is 1.5"),
    ],
)
def test_what_is_not_expressed_exactly_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        architecture_from_hf(folder(tmp_path, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ...},
        {"architectures": None},
        {"architectures": []},
        {"architectures": ["LlamaModel"]},
        {"architectures": ["LLaMAForCausalLM"]},
        {"auto_map": {"AutoModelForCausalLM": "org/code--modeling_llama.LlamaForCausalLM", "AutoConfig": "a.B"}},
        {"layer_types": ["full_attention"] * 2},
        {"layer_types": None},
        {"is_causal": True},
        {"hidden_act": "swish"},
        {"eos_token_id": [1, 2], "pad_token_id": -1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_parameters": {"type": "default"}},
        {"rope_parameters": {}, "rope_scaling": {}},
        {"my_key": {"a": float("nan")}},
    ],
)
def test_what_changes_nothing_is_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    plain = architecture_from_hf(folder(tmp_path))
    assert architecture_from_hf(folder(tmp_path, **changes)) == plain


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": LLAMA_3 | {"rope_type": "llama3"}, "rope_theta": ...},
        {"rope_scaling": LLAMA_3 | {"rope_type": "llama3"}, "rope_parameters": LLAMA_3 | {"rope_type": "llama3"}},
        {"rope_parameters": LLAMA_3 | {"type": "llama3", "rope_theta": 7.0}, "rope_theta": ..., "rope_scaling": ...},
    ],
)
def test_rope_is_what_transformers_takes_it_for(tmp_path: Path, changes: dict[str, Any]) -> None:
    architecture = architecture_from_hf(folder(tmp_path, **changes))
    rope = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert architecture.rotary_base == rope["rope_theta"]
    assert architecture.rope_scaling is not None
    assert architecture.rope_scaling.model_dump() == {key: rope[key] for key in LLAMA_3}


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    (folder(tmp_path) / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="has adapter_config.json: an adapter that would not be applied. Merge it"):
        architecture_from_hf(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"[]", "must hold a JSON object"),
        (b'{"a": "\xff"}', "is not JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is nested too deeply"),
    ],
)
def test_damaged_config(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_hf_config(tmp_path)


def test_missing_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no config.json"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize("rope", [None, LLAMA_3])
@pytest.mark.parametrize("biases", [False, True])
def test_written_config_means_the_same_to_transformers(
    tmp_path: Path, rope: dict[str, float] | None, biases: bool
) -> None:
    theta = {"rope_theta": 250000.0}
    original = LlamaConfig(
        **{key: value for key, value in VERSION_4.items() if not key.startswith("rope") and key != "torch_dtype"},
        head_dim=16,
        attention_bias=biases,
        mlp_bias=biases,
        rope_parameters=theta | ({"rope_type": "default"} if rope is None else rope | {"rope_type": "llama3"}),
        dtype="bfloat16",
        bos_token_id=1,
        eos_token_id=[2, 4],
        pad_token_id=9,
    )
    original.save_pretrained(tmp_path)
    architecture = architecture_from_hf(tmp_path)
    written = hf_config_from_architecture(architecture, read_hf_config(tmp_path), "bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert architecture_from_hf(tmp_path) == architecture
    loaded, wanted = AutoConfig.from_pretrained(tmp_path).to_dict(), original.to_dict()
    for volatile in ("_name_or_path", "architectures", "transformers_version", "rope_theta", "rope_scaling"):
        loaded.pop(volatile, None)
        wanted.pop(volatile, None)
    assert loaded == wanted


def test_version_4_spelling_is_written_too() -> None:
    architecture = GPTArchitecture(
        num_layers=1,
        hidden_size=8,
        ffn_hidden_size=8,
        num_attention_heads=2,
        vocab_size=10,
        max_position_embeddings=8,
        rotary_base=5.0,
        rope_scaling=RopeScaling(**LLAMA_3),  # type: ignore[arg-type]
    )
    written = hf_config_from_architecture(architecture, None, "float32")
    assert written["rope_theta"] == 5.0
    assert written["rope_scaling"] == LLAMA_3 | {"rope_type": "llama3"}
    assert written["torch_dtype"] == "float32"


def test_tokens_outside_the_vocabulary_are_left_out() -> None:
    architecture = GPTArchitecture(
        num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, vocab_size=10, max_position_embeddings=8
    )
    source = {"bos_token_id": 1, "eos_token_id": [2, 10], "pad_token_id": 10}
    written = hf_config_from_architecture(architecture, source, "float32")
    assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == (1, [2], None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "LayerNorm"}, "llama needs normalization RMSNorm and it is LayerNorm"),
        ({"qk_layernorm": True, "add_qkv_bias": True}, "qwen3 needs add_qkv_bias False and it is True"),
        (
            {"hidden_size": 10, "num_attention_heads": 4, "kv_channels": 8, "add_bias_linear": True},
            r"hidden_size \(10\) to be a multiple of num_attention_heads \(4\)",
        ),
    ],
)
def test_a_model_no_family_expresses_is_refused(changes: dict[str, Any], message: str) -> None:
    base = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2, "vocab_size": 10}
    with pytest.raises(UserError, match=message):
        hf_config_from_architecture(
            GPTArchitecture(**(base | {"max_position_embeddings": 8} | changes)), None, "float32"
        )


@pytest.mark.parametrize(
    ("changes", "model_type"),
    [
        ({}, "llama"),
        ({"hidden_size": 10, "num_attention_heads": 4, "kv_channels": 8}, "mistral"),
        ({"sliding_window": 4}, "mistral"),
        ({"add_qkv_bias": True}, "qwen2"),
        ({"qk_layernorm": True}, "qwen3"),
        ({"rotary_percent": 0.5}, "phi3"),
    ],
)
def test_the_first_family_that_expresses_a_model_is_taken(
    tmp_path: Path, changes: dict[str, Any], model_type: str
) -> None:
    base = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2, "vocab_size": 10}
    architecture = GPTArchitecture(**(base | {"max_position_embeddings": 8} | changes))
    written = hf_config_from_architecture(architecture, None, "float32")
    assert written["model_type"] == model_type
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert AutoConfig.from_pretrained(tmp_path).model_type == model_type
    assert architecture_from_hf(tmp_path) == architecture
