from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megakd.common.errors import UserError
from megakd.convert import architecture_from_hf, check_weights, export_hf
from megakd.convert.safetensors_folder import SafetensorsFolder
from tests.convert.export_ranks import export_from_ranks, export_with_failing_disk, stage_parameters
from tests.convert.llama_models import ALL_HEADS, GROUPED, save_llama

ROOT = Path(__file__).resolve().parents[2]
MODELS: dict[str, dict[str, Any]] = {
    "grouped": GROUPED | {"head_dim": 16},
    "all_heads_tied": ALL_HEADS | {"tie_word_embeddings": True},
    "biases": GROUPED | {"attention_bias": True, "mlp_bias": True},
}


def assert_same_weights(found: Path, expected: Path) -> None:
    with SafetensorsFolder(found) as ours, SafetensorsFolder(expected) as theirs:
        assert sorted(ours.names) == sorted(theirs.names)
        for name in theirs.names:
            assert ours.dtype(name) == theirs.dtype(name)
            assert torch.equal(ours.read(name), theirs.read(name)), name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact_and_transformers_computes_the_same(tmp_path: Path, model: str, dtype: torch.dtype) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    save_llama(source, dtype, **MODELS[model])
    export_hf(
        stage_parameters(source),
        out,
        architecture_from_hf(source),
        dtype=dtype,
        source_config_dir=source,
    )
    assert_same_weights(out, source)
    assert [file.name for file in out.glob("*.safetensors")] == ["model.safetensors"]
    original, loaded = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (source, out))
    assert loaded.dtype is dtype
    tokens = torch.randint(0, 130, (2, 11))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, original(tokens).logits)
    assert loaded.config.eos_token_id == [5, 7]
    assert loaded.generation_config.eos_token_id == [5, 7]


def test_large_models_are_written_in_several_files(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    save_llama(source)
    limit = 20_000
    export_hf(stage_parameters(source), out, architecture_from_hf(source), dtype=torch.float32, max_shard_bytes=limit)
    assert_same_weights(out, source)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 2
    with SafetensorsFolder(source) as folder:
        sizes = {name: 4 * folder.read(name).numel() for name in folder.names}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    for file in files:
        assert sum(sizes[name] for name, holder in index["weight_map"].items() if holder == file) <= limit
    AutoModelForCausalLM.from_pretrained(out)


def test_tokenizer_files_are_copied_and_weights_are_not(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    save_llama(source)
    (source / "tokenizer.json").write_text("{}")
    for name in ("tekken.json", "spiece.model", "chat_template.jinja"):
        (source / name).write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    for name in ("tool_use.jinja", "rag.jinja", "code.py"):
        (source / "additional_chat_templates" / name).write_text("{{ tools }}")
    (source / "modeling_custom.py").write_text("raise SystemExit")
    export_hf(stage_parameters(source), out, architecture_from_hf(source), dtype=torch.float32, tokenizer_from=source)
    assert sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()) == [
        "additional_chat_templates/rag.jinja",
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "spiece.model",
        "tekken.json",
        "tokenizer.json",
    ]
    export_hf(stage_parameters(source), out, architecture_from_hf(source), dtype=torch.float32)
    assert not (out / "additional_chat_templates").exists()


def test_transformers_finds_every_chat_template_in_an_export(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    save_llama(source)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "configs" / "quickstart" / "teacher")
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(source)
    assert (source / "additional_chat_templates" / "tool_use.jinja").is_file()
    export_hf(stage_parameters(source), out, architecture_from_hf(source), dtype=torch.float32, tokenizer_from=source)
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template


def test_an_earlier_export_is_replaced_and_nothing_is_left_beside(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    save_llama(source)
    for _ in range(2):
        parameters = stage_parameters(source)
        parameters["decoder.final_layernorm.weight"].fill_(2.5)
        export_hf(parameters, out, architecture_from_hf(source), dtype=torch.float32)
        source, out = out, source
    with SafetensorsFolder(tmp_path / "source") as folder:
        assert folder.read("model.norm.weight").unique().tolist() == [2.5]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "source"]


def test_a_tokenizer_source_without_tokenizer_is_told(tmp_path: Path, log_messages: list[str]) -> None:
    source = tmp_path / "source"
    save_llama(source)
    architecture = architecture_from_hf(source)
    export_hf(stage_parameters(source), tmp_path / "out", architecture, dtype=torch.float32, tokenizer_from=source)
    assert any("source has no tokenizer files" in message for message in log_messages)


@pytest.mark.parametrize("beside", [[], ["config.json"]])
def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path, beside: list[str]) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    save_llama(source)
    out.mkdir()
    for name in ["thesis.tex", *beside]:
        (out / name).write_text("precious")
    with pytest.raises(UserError, match=r"out holds thesis\.tex, which no export writes"):
        export_hf(stage_parameters(source), out, architecture_from_hf(source), dtype=torch.float32)
    assert (out / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("role", ["tokenizer_from", "source_config_dir"])
def test_the_model_it_comes_from_is_not_replaced(tmp_path: Path, role: str) -> None:
    source = tmp_path / "source"
    save_llama(source)
    parameters = stage_parameters(source)
    with pytest.raises(UserError, match="source is where the model comes from"):
        export_hf(parameters, source, architecture_from_hf(source), dtype=torch.float32, **{role: source})  # type: ignore[arg-type]


def test_missing_parameter_is_named(tmp_path: Path) -> None:
    save_llama(tmp_path / "source")
    parameters = stage_parameters(tmp_path / "source")
    del parameters["decoder.layers.1.mlp.linear_fc2.weight"]
    with pytest.raises(UserError, match="decoder.layers.1.mlp.linear_fc2.weight is not among the parameters"):
        export_hf(parameters, tmp_path / "out", architecture_from_hf(tmp_path / "source"), dtype=torch.float32)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("tp_size", "stages"), [(2, 2), (1, 2), (4, 1)])
def test_export_from_ranks_is_exact(
    tmp_path: Path, run_ranks: Callable[..., list[str]], model: str, tp_size: int, stages: int
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    save_llama(source, torch.bfloat16, **MODELS[model])
    assert run_ranks(4, export_from_ranks, source, out, tp_size, stages, 20_000) == ["written"] * 4
    assert_same_weights(out, source)
    check_weights(out, architecture_from_hf(source))
    assert architecture_from_hf(out) == architecture_from_hf(source)


def test_all_ranks_hear_that_the_folder_cannot_be_made(tmp_path: Path, run_ranks: Callable[..., list[str]]) -> None:
    source = tmp_path / "source"
    save_llama(source)
    (tmp_path / "file").write_text("")
    answers = run_ranks(4, export_from_ranks, source, tmp_path / "file" / "out", 2, 2, 20_000)
    assert all(answer.startswith("The model could not be written to") for answer in answers)


def test_all_ranks_hear_that_the_disk_is_full(tmp_path: Path, run_ranks: Callable[..., list[str]]) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    save_llama(source)
    answers = run_ranks(4, export_with_failing_disk, source, out)
    assert all("could not be written" in answer and "No space left" in answer for answer in answers)
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]
