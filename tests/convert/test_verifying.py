"""On which tokens `verify` compares logits, and what transformers is told of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megakd.config.architecture import GPTArchitecture
from megakd.convert.verifying import describe_tokens, random_tokens
from tests.convert.family_models import save_model
from tools.convert_checkpoint import main


@pytest.mark.parametrize(
    ("positions", "window", "said"),
    [
        (4096, None, "2 x 256 tokens"),
        (100, None, "2 x 100 tokens"),
        (4096, 16, "2 x 256 tokens"),
        (4096, 256, "2 x 320 tokens"),
        (4096, 1024, "2 x 1088 tokens"),
        (1024, 1024, "2 x 1024 tokens, within the sliding window of 1,024,"),
        (32768, 4096, "2 x 256 tokens, within the sliding window of 4,096,"),
    ],
)
def test_tokens(positions: int, window: int | None, said: str) -> None:
    architecture = GPTArchitecture(
        num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, vocab_size=10, sliding_window=window,
        max_position_embeddings=positions,
    )  # fmt: skip
    tokens = random_tokens(architecture)
    assert torch.equal(tokens, random_tokens(architecture))
    assert describe_tokens(architecture, tokens) == said


def edit(path: Path, change: dict[str, Any]) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def converted(folder: Path, name: str, change: dict[str, Any]) -> list[str]:
    save_model(folder / "hf", name)
    edit(folder / "hf", change)
    assert main(["import", "--hf", str(folder / "hf"), "--out", str(folder / "megatron")]) == 0
    return ["verify", "--hf", str(folder / "hf"), "--megatron", str(folder / "megatron")]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mistral_window", {"max_position_embeddings": 512, "sliding_window": 300}),
        ("llama3_tied", {"max_position_embeddings": 512}),
        ("gpt2", {"hidden_size": 64, "num_attention_heads": 4}),
    ],
)
def test_long_sequences(tmp_path: Path, name: str, change: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    command = converted(tmp_path, name, change)
    capsys.readouterr()
    assert main(command) == 0
    assert "within" not in capsys.readouterr().out


def test_what_changes_no_logit_is_not_spoken_of(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = converted(tmp_path, "llama2", {"eos_token_id": 5000, "pad_token_id": -1, "return_dict": False})
    capfd.readouterr()
    assert main(command) == 0
    said = capfd.readouterr()
    assert said.err == "" and len(said.out.splitlines()) == 3


def test_a_folder_that_transformers_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = converted(tmp_path, "llama2", {"attention_dropout": "much"})
    capsys.readouterr()
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: transformers cannot load {tmp_path / 'hf'} (") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("llama3_tied", {"rope_scaling_factor": 4.0, "use_rope_scaling": True, "swiglu": True}),
        ("gpt2", {"bias_gelu_fusion": True, "swiglu": False, "use_rope_scaling": False, "rope_scaling_factor": 8.0}),
        ("gpt2_untied", {"bias_gelu_fusion": False, "openai_gelu": False, "squared_relu": False}),
    ],
)
def test_what_megatron_lm_is_told(tmp_path: Path, name: str, arguments: dict[str, Any]) -> None:
    converted(tmp_path, name, {})
    common = torch.load(tmp_path / "megatron" / "release" / "common.pt", weights_only=False)
    assert {key: getattr(common["args"], key) for key in arguments} == arguments


def change_weights(path: Path, change: Any) -> None:
    weights = load_file(path / "model.safetensors")
    save_file(change(weights), path / "model.safetensors", metadata={"format": "pt"})


def put(value: float) -> Any:
    """A change that puts a value into one weight."""

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights["model.layers.1.mlp.down_proj.weight"][2, 3] = value
        return weights

    return change


BROKEN = (
    "  decoder.layers.1.mlp.linear_fc2.weight: of 6,144 elements {} in {}/hf and {} in {}/megatron are NaN or infinite"
)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("written_as", [[], ["--dtype", "bf16"]])
def test_a_weight_that_is_not_finite_on_both_sides(
    tmp_path: Path, value: float, written_as: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "hf", "llama2")
    change_weights(tmp_path / "hf", put(value))
    if written_as:  # values that both types hold
        change_weights(tmp_path / "hf", lambda weights: {name: w.bfloat16().float() for name, w in weights.items()})
    command = ["--hf", str(tmp_path / "hf"), "--megatron", str(tmp_path / "megatron")]
    assert main(["import", *command[:2], "--out", command[3], *written_as]) == 0
    capsys.readouterr()
    assert main(["verify", *command, "--weights-only"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [BROKEN.format(1, tmp_path, 1, tmp_path), "the same"]
    assert main(["verify", *command]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == BROKEN.format(1, tmp_path, 1, tmp_path)
    assert lines[2].startswith("logits are not compared: those of a model with decoder.layers.1.mlp.linear_fc2.weight")
    assert lines[3] == "not known to be the same"


def test_a_weight_that_is_nan_on_one_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = converted(tmp_path, "llama2", {})
    change_weights(tmp_path / "hf", put(torch.nan))
    capsys.readouterr()
    assert main(command) == 1
    lines = capsys.readouterr().out.splitlines()
    assert BROKEN.format(1, tmp_path, 0, tmp_path) in lines and lines[-1] == "different"


@pytest.mark.parametrize("name", ["llama3_tied", "gpt2"])
def test_weights_that_were_saved_out_of_wrapped_modules(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What torch names them: the whole model compiled under data parallelism, and a part of it compiled."""
    hf, megatron = str(tmp_path / "hf"), str(tmp_path / "megatron")
    model = save_model(tmp_path / "hf", name)
    base = model.base_model
    blocks = base.h if name == "gpt2" else base.layers
    plain = [key for key, _ in model.named_parameters()]
    blocks[1] = torch.compile(blocks[1])
    wrapped = torch.nn.ModuleDict({"module": torch.compile(model)})
    names = [key for key, _ in wrapped.named_parameters()]
    found = dict(zip(plain, names, strict=True))
    assert any(new.startswith("module._orig_mod.") and new.count("_orig_mod") == 2 for new in names)
    assert main(["import", "--hf", hf, "--out", megatron]) == 0
    change_weights(tmp_path / "hf", lambda weights: {found.get(key, key): w for key, w in weights.items()})
    assert main(["import", "--hf", hf, "--out", megatron, "--overwrite"]) == 0
    assert main(["export", "--megatron", megatron, "--out", str(tmp_path / "back")]) == 0
    capsys.readouterr()
    assert main(["verify", "--hf", hf, "--megatron", megatron]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "the same"
    weights = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(weights[old], parameter) for old, parameter in zip(plain, model.parameters(), strict=True))
