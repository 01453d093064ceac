"""What of its source's config.json an exported model keeps, and what not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from megakd.convert import architecture_from_hf, export_hf, hf_config_from_architecture, read_hf_config
from megakd.convert.exporting import export_checkpoint
from megakd.convert.importing import import_checkpoint
from tests.convert.export_ranks import stage_parameters
from tests.convert.family_models import MODELS, save_model

KEPT: dict[str, Any] = {
    "attention_dropout": 0.25, "id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1},
    "my_key": {"a": [1]}, "use_cache": False, "tokenizer_class": "GPT2Tokenizer",
}  # fmt: skip


def changed(path: Path, change: dict[str, Any]) -> None:
    file = path / "config.json"
    config = {key: value for key, value in (json.loads(file.read_text()) | change).items() if value is not ...}
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_the_same_configuration_from_an_export(tmp_path: Path, name: str) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    save_model(source, name)
    extra = {"output_router_logits": True, "router_aux_loss_coef": 0.5} if "moe" in name or "mixtral" in name else {}
    if name.startswith(("gpt2", "phi3")):
        extra |= {"resid_pdrop": 0.3, "embd_pdrop": 0.4}
    changed(source, KEPT | extra)
    export_hf(
        stage_parameters(source), out, architecture_from_hf(source), dtype=torch.float32, source_config_dir=source
    )
    written = read_hf_config(out)
    assert {key: written[key] for key in KEPT | extra} == KEPT | extra
    one, other = (AutoConfig.from_pretrained(path).to_dict() for path in (source, out))
    # Of Mixtral's and Mistral's family tables; transformers computes it where it is left out.
    for key in ("_name_or_path", "head_dim", "torch_dtype"):
        one.pop(key, None), other.pop(key, None)
    assert {key: value for key, value in other.items() if key not in one} in ({}, {"partial_rotary_factor": 0.75})
    assert {key: other[key] for key in one} | {"n_inner": None} == one | {"n_inner": None}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("qwen2", "full_attention"), ("qwen3", "full_attention"), ("mistral_window", "sliding_attention")],
)
def test_a_student_of_another_shape(tmp_path: Path, name: str, kind: str) -> None:
    source = tmp_path / "source"
    save_model(source, name)
    stale = {
        "layer_types": [kind] * 4, "mlp_layer_types": ["dense"] * 4, "max_window_layers": 4, "_name_or_path": "me/it",
        "transformers_version": "4.0.0", "_attn_implementation": "someone/code", "attn_implementation": "someone/code",
        "auto_map": {"AutoConfig": "configuration_mine.C"}, "custom_pipelines": {"a": {"impl": "mine.P"}},
        "pretraining_tp": 4, "sep_token_id": 130, "quantization_config": None, "is_causal": True,
    }  # fmt: skip
    changed(source, KEPT | stale)
    teacher = architecture_from_hf(source)
    student = teacher.model_copy(update={"num_layers": 2, "vocab_size": 100, "ffn_hidden_size": 32})
    written = hf_config_from_architecture(student, read_hf_config(source), "bfloat16")
    assert written["layer_types"] == [kind] * 2
    left = set(stale) - {"layer_types", "max_window_layers", "sep_token_id"}
    assert not left & set(written)
    assert written["sep_token_id"] is None
    assert {key: written[key] for key in KEPT} == KEPT
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(written))
    assert architecture_from_hf(out) == student
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out))
    assert (model.config.num_hidden_layers, model.config.vocab_size, model.config.intermediate_size) == (2, 100, 32)


def test_another_scaling_than_the_sources_is_not_undone(tmp_path: Path) -> None:
    save_model(tmp_path, "llama3_tied")
    changed(tmp_path, {"original_max_position_embeddings": 16})
    architecture = architecture_from_hf(tmp_path)
    assert architecture.rope_scaling is not None
    scaling = architecture.rope_scaling.model_copy(update={"original_max_position_embeddings": 32})
    other = architecture.model_copy(update={"rope_scaling": scaling})
    changed(tmp_path, hf_config_from_architecture(other, read_hf_config(tmp_path), "float32"))
    changed(tmp_path, {"original_max_position_embeddings": ...})
    assert architecture_from_hf(tmp_path) == other


def test_aliases_do_not_survive(tmp_path: Path) -> None:
    save_model(tmp_path, "gpt2")
    changed(tmp_path, {"num_hidden_layers": 4, "hidden_size": 64, "n_ctx": 64})
    student = architecture_from_hf(tmp_path).model_copy(update={"num_layers": 2, "max_position_embeddings": 32})
    written = hf_config_from_architecture(student, read_hf_config(tmp_path), "float32")
    assert not {"num_hidden_layers", "hidden_size", "n_ctx"} & set(written)
    assert (written["n_layer"], written["n_positions"]) == (2, 32)


def test_nothing_is_kept_of_another_family(tmp_path: Path) -> None:
    save_model(tmp_path, "llama2")
    student = architecture_from_hf(tmp_path).model_copy(update={"qk_layernorm": True})
    written = hf_config_from_architecture(student, read_hf_config(tmp_path) | {"my_key": 1}, "float32")
    assert written["model_type"] == "qwen3"
    assert "my_key" not in written and written["eos_token_id"] == 3


def test_ids_that_are_none_are_left_out(tmp_path: Path) -> None:
    save_model(tmp_path, "llama2")
    source = {"eos_token_id": ["a", 2, True, -1, 131], "bos_token_id": "a", "pad_token_id": -1}
    written = hf_config_from_architecture(architecture_from_hf(tmp_path), source, "float32")
    assert (written["eos_token_id"], written["bos_token_id"], written["pad_token_id"]) == ([2], None, None)


def test_the_type_told_is_that_of_most_bytes(tmp_path: Path) -> None:
    model = save_model(tmp_path / "hf", "llama2", torch.bfloat16)
    for name, module in model.named_modules():
        if "norm" in name:
            module.float()
    model.save_pretrained(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    written = read_hf_config(tmp_path / "out")
    assert (written["dtype"], written["torch_dtype"]) == ("bfloat16", "bfloat16")
    common = torch.load(tmp_path / "megatron" / "release" / "common.pt", weights_only=False)
    assert common["args"].params_dtype is torch.bfloat16 and common["args"].bf16


def test_code_is_not_named_beside_a_checkpoint(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", "llama2")
    changed(tmp_path / "hf", {"auto_map": {"AutoConfig": "mine.C"}})
    import_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    assert "auto_map" not in read_hf_config(tmp_path / "megatron")
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "megatron"), transformers.LlamaConfig)
