"""Every key that transformers reads from config.json is in a family's table, or known to change no logits."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from megakd.common.errors import UserError
from megakd.convert import architecture_from_hf
from megakd.convert.families import FAMILIES
from megakd.convert.hf_checks import ONLY_IN_EVERY_FAMILY, TOKEN_KEYS
from megakd.convert.hf_rope import ROPE_KEYS
from megakd.convert.table import Family
from tests.convert.family_models import save_model

# What says nothing of the logits of a causal language model in eval mode, and why.
TRAINING = dict.fromkeys(
    (
        "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "router_aux_loss_coef", "summary_first_dropout",
    ),
    "only in training",
)  # fmt: skip
OTHER_HEADS = dict.fromkeys(
    (
        "id2label", "label2id", "num_labels", "problem_type", "classifier_dropout", "hidden_dropout", "summary_type",
        "summary_last_dropout",
        "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    ),
    "classes with another head, which `architectures` must not name",
)  # fmt: skip
IRRELEVANT = TRAINING | OTHER_HEADS | {
    "transformers_version": "who wrote it",
    "_name_or_path": "where it was loaded from",
    "use_cache": "how generation goes, not what it computes",
    "output_hidden_states": "what is returned beside the logits",
    "output_attentions": "what is returned beside the logits",
    "output_router_logits": "what is returned beside the logits",
    "return_dict": "how outputs are wrapped",
    "chunk_size_feed_forward": "no model here reads it",
    "is_encoder_decoder": "only generation reads it",
    "pretraining_tp": "the same computation in parts, in transformers 4",
    "reorder_and_upcast_attn": "the order and the type of the same computation",
    "original_max_position_embeddings": "read with rope_type llama3 (hf_rope.py) and longrope, which is refused",
    "max_window_layers": "only with use_sliding_window",
    "_attn_implementation": "which kernel computes it",
}  # fmt: skip
PER_FAMILY = {("qwen2", "sliding_window"), ("qwen3", "sliding_window"), ("qwen3_moe", "sliding_window")}
"""Only with `use_sliding_window`, which must be false."""


def known(family: Family) -> set[str]:
    keys = {name for key in family.fields.values() for name in (*key.names, *key.aliases)}
    # megakd.convert.hf_checks and the weights' own type.
    elsewhere = {"architectures", "auto_map", "layer_types", "model_type", "dtype", "torch_dtype"}
    return keys | set(family.only) | set(ONLY_IN_EVERY_FAMILY) | set(TOKEN_KEYS) | set(ROPE_KEYS) | elsewhere


def unknown(family: Family, keys: set[str]) -> list[str]:
    accounted = (
        known(family) | set(IRRELEVANT) | {key for model_type, key in PER_FAMILY if model_type == family.model_type}
    )
    return sorted(keys - accounted)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_every_key_of_the_configuration_class(family: Family) -> None:
    config = AutoConfig.for_model(family.model_type)
    assert unknown(family, set(config.to_dict()) | set(config.attribute_map)) == []


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_every_key_the_modeling_file_reads(family: Family) -> None:
    module = importlib.import_module(f"transformers.models.{family.model_type}.modeling_{family.model_type}")
    source = inspect.getsource(module)
    keys = set(re.findall(r"\bconfig\.(\w+)", source)) | set(
        re.findall(r'(?:get|has)attr\((?:self\.)?config, "(\w+)"', source)
    )
    # Methods and class attributes of configurations.
    keys -= {"per_layer_config", "get_text_config"}
    assert unknown(family, keys) == []


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_every_alias(family: Family) -> None:
    config = AutoConfig.for_model(family.model_type)
    assert {(alias, key) for alias, key in config.attribute_map.items()} == {
        (alias, key.names[0]) for key in family.fields.values() for alias in key.aliases
    }


def changed(path: Path, change: dict[str, object]) -> None:
    file = path / "config.json"
    config = {key: value for key, value in (json.loads(file.read_text()) | change).items() if value is not ...}
    file.write_text(json.dumps(config))


def logits(path: Path) -> torch.Tensor:
    tokens = torch.randint(131, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result: torch.Tensor = AutoModelForCausalLM.from_pretrained(path).eval()(tokens).logits
    return result


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama2", {"is_causal": False}),
        ("gpt2", {"is_causal": False}),
        ("mixtral", {"is_causal": None}),
        ("mistral_window", {"layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("llama3_tied", {"original_max_position_embeddings": 7}),
        ("llama3_tied", {"rope_scaling": {"rope_type": "default", "rope_theta": 5000.0}}),
        ("llama2", {"rope_theta": 7.0, "rope_scaling": {"rope_type": "default"}}),
        ("gpt2", {"scale_attn_weights": False}),
    ],
)
def test_what_transformers_computes_otherwise_is_refused(tmp_path: Path, name: str, change: dict[str, object]) -> None:
    save_model(tmp_path, name)
    before = logits(tmp_path)
    changed(tmp_path, change)
    assert (logits(tmp_path) - before).abs().max() > 1e-3
    with pytest.raises(UserError):
        architecture_from_hf(tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qwen2", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4}),
        ("qwen3_moe", {"layer_types": ["sliding_attention"] * 4}),
        ("mistral", {"layer_types": ["sliding_attention"] * 4}),
        ("mixtral", {"layer_types": ["full_attention"] * 4}),
        ("mistral_window", {"layer_types": ["sliding_attention"] * 3}),
        ("qwen3_moe", {"num_experts": 8}),
        ("mixtral", {"num_experts": 8}),
        ("gpt2", {"hidden_size": 32}),
        ("gpt2", {"num_hidden_layers": 2}),
    ],
)
def test_a_contradiction_is_refused(tmp_path: Path, name: str, change: dict[str, object]) -> None:
    save_model(tmp_path, name)
    changed(tmp_path, change)
    key, value = next(iter(change.items()))
    with pytest.raises(UserError, match=f"{key} is {re.escape(json.dumps(value))}"):
        architecture_from_hf(tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mistral_window", {"layer_types": ["sliding_attention"] * 4}),
        ("phi3", {"layer_types": ["sliding_attention"] * 4}),
        ("qwen3", {"layer_types": ["full_attention"] * 4}),
        ("gpt2", {"n_embd": ..., "n_layer": ..., "n_head": ..., "n_positions": ...}
         | {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 64}),
        ("gpt2_untied", {"n_head": ..., "num_attention_heads": 4, "n_embd": 64, "hidden_size": 64}),
        ("mixtral", {"num_local_experts": ..., "num_experts": 4}),
        ("qwen3_moe", {"num_local_experts": ..., "num_experts": 6, "mlp_only_layers": None}),
    ],
)  # fmt: skip
def test_other_words_for_the_same_model(tmp_path: Path, name: str, change: dict[str, object]) -> None:
    save_model(tmp_path, name)
    architecture, before = architecture_from_hf(tmp_path), logits(tmp_path)
    changed(tmp_path, change)
    assert architecture_from_hf(tmp_path) == architecture
    assert torch.equal(logits(tmp_path), before)


def test_the_configuration_classes_are_transformers_own() -> None:
    for family in FAMILIES:
        assert getattr(transformers, family.model_class).config_class.model_type == family.model_type
        assert hasattr(transformers, family.base_class)
