"""Every family's round trip, and config.json as both versions of transformers write it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from megakd.common.errors import UserError
from megakd.convert import architecture_from_hf, check_weights, export_hf
from megakd.convert.families import FAMILIES
from tests.convert.export_ranks import stage_parameters
from tests.convert.family_models import MODELS, save_model
from tests.convert.test_exporting import assert_same_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_exact(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    original = save_model(source, name, dtype)
    architecture = architecture_from_hf(source)
    export_hf(stage_parameters(source), out, architecture, dtype=dtype, source_config_dir=source)
    assert_same_weights(out, source)
    assert architecture_from_hf(out) == architecture
    # Not `original`: turned to another type after it was made, it holds rope's frequencies in that type too.
    again, loaded = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (source, out))
    assert type(loaded) is type(original)
    assert loaded.dtype is dtype
    tokens = torch.randint(131, (2, 30))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, again(tokens).logits)


def test_every_table_has_a_model_here() -> None:
    model_types = {getattr(transformers, f"{family}Config").model_type for family, _ in MODELS.values()}
    assert model_types == {family.model_type for family in FAMILIES}


def rewritten(path: Path, change: dict[str, object]) -> None:
    """Replace keys of config.json, or take them out by `...`."""
    file = path / "config.json"
    config = {key: value for key, value in (json.loads(file.read_text()) | change).items() if value is not ...}
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("gpt2")])
def test_config_of_version_4(tmp_path: Path, name: str) -> None:
    save_model(tmp_path, name)
    architecture = architecture_from_hf(tmp_path)
    rope = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    theta, part = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", None)
    scaling = None if rope["rope_type"] == "default" else rope
    change = {"rope_theta": theta, "rope_scaling": scaling, "torch_dtype": "float32"}
    rewritten(
        tmp_path, change | {"rope_parameters": ..., "dtype": ...} | ({"partial_rotary_factor": part} if part else {})
    )
    assert architecture_from_hf(tmp_path) == architecture


@pytest.mark.parametrize("name", ["llama3_tied", "qwen3", "gpt2"])
def test_keys_left_out_are_the_familys_own(tmp_path: Path, name: str) -> None:
    """transformers leaves out keys that have its class's value; it is asked what they mean."""
    model = save_model(tmp_path, name)
    optional = {"initializer_range", "tie_word_embeddings", "rms_norm_eps", "layer_norm_epsilon", "n_inner"}
    config = type(model.config)()
    config.update({key: value for key, value in model.config.to_dict().items() if key not in optional})
    written = config.to_diff_dict() | {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(written | {"model_type": config.model_type}))
    architecture = architecture_from_hf(tmp_path)
    assert architecture.layernorm_epsilon == getattr(config, "rms_norm_eps", None) or config.layer_norm_epsilon
    assert architecture.init_method_std == config.initializer_range
    assert architecture.share_embeddings_and_output_weights == config.tie_word_embeddings


def test_the_number_of_experts_as_version_4_spells_it(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3_moe")
    rewritten(tmp_path, {"num_local_experts": ..., "num_experts": 6})
    assert architecture_from_hf(tmp_path).num_moe_experts == 6
    rewritten(tmp_path, {"num_experts": ..., "moe_intermediate_size": ..., "norm_topk_prob": ...})
    architecture = architecture_from_hf(tmp_path)
    assert (architecture.num_moe_experts, architecture.moe_ffn_hidden_size) == (128, 768)
    assert architecture.moe_router_pre_softmax


def test_mistral_without_a_window_key_has_the_familys_window(tmp_path: Path) -> None:
    save_model(tmp_path, "mistral")
    assert architecture_from_hf(tmp_path).sliding_window is None
    rewritten(tmp_path, {"sliding_window": ..., "num_key_value_heads": ...})
    with pytest.raises(UserError, match="must be a multiple of num_query_groups"):
        architecture_from_hf(tmp_path)
    rewritten(tmp_path, {"num_key_value_heads": None})
    architecture = architecture_from_hf(tmp_path)
    assert (architecture.sliding_window, architecture.num_query_groups) == (4096, 4)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is true in .*; only false is supported for qwen2"),
        ("qwen3", {"attention_bias": True}, "attention_bias is true"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\] in .*; only \[\] is supported"),
        (
            "qwen3_moe",
            {"norm_topk_prob": True, "num_experts_per_tok": 1},
            "moe_router_topk 1 needs moe_router_pre_softmax",
        ),
        ("mixtral", {"num_experts_per_tok": 5}, r"moe_router_topk \(5\) must not be above num_moe_experts \(4\)"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true"),
        ("gpt2", {"activation_function": "relu"}, 'activation_function is "relu" in .*; only "gelu_new", "gelu" are'),
        ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, 'rope_type is "longrope"'),
        ("llama2", {"model_type": "falcon"}, "'falcon' in .*; .* are: llama, mistral, mixtral, qwen2, .*, gpt2"),
    ],
)
def test_what_a_family_does_not_express_is_refused(
    tmp_path: Path, name: str, change: dict[str, object], message: str
) -> None:
    save_model(tmp_path, name)
    rewritten(tmp_path, change)
    with pytest.raises(UserError, match=message):
        architecture_from_hf(tmp_path)


def test_a_base_models_folder_has_names_without_prefix(tmp_path: Path) -> None:
    model = save_model(tmp_path / "whole", "gpt2")
    model.transformer.save_pretrained(tmp_path / "base")
    architecture = architecture_from_hf(tmp_path / "base")
    check_weights(tmp_path / "base", architecture)
    whole, base = (stage_parameters(tmp_path / kind) for kind in ("whole", "base"))
    assert all(torch.equal(base[name], weight) for name, weight in whole.items())
