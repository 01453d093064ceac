"""On which tokens `verify` compares logits, and what transformers is told of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

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
