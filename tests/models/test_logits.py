"""Imported models against transformers, and random ones against themselves under other layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megakd.config.architecture import GPTArchitecture
from megakd.convert.hf_config import architecture_from_hf
from tests.models.forward import full_logits

TEACHER = Path(__file__).resolve().parents[2] / "configs" / "quickstart" / "teacher"
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


def _tokens(vocab_size: int, length: int = 48) -> torch.Tensor:
    return torch.randint(vocab_size, (3, length), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(_tokens(4096)).logits


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_imported_teacher_equals_transformers(
    tp: int, pp: int, sequence_parallel: bool, expected: torch.Tensor, run_ranks: Callable[..., list[Any]]
) -> None:
    if sequence_parallel and tp == 1:
        pytest.skip("sequence parallelism needs tensor parallelism")
    architecture = architecture_from_hf(TEACHER)
    found = run_ranks(tp * pp, _run, architecture, str(TEACHER), _tokens(4096), tp, pp, sequence_parallel, None, None)
    for logits in found:
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tp", [1, 2])
def test_llama_3_rope_scaling_and_tied_embeddings(tp: int, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    torch.manual_seed(0)
    scaling = {
        "rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, rope_parameters=scaling,
        initializer_range=0.2,
    )).eval()  # fmt: skip
    model.save_pretrained(tmp_path)
    tokens = _tokens(300)
    with torch.no_grad():
        expected = model(tokens).logits
    found = run_ranks(tp, _run, architecture_from_hf(tmp_path), str(tmp_path), tokens, tp, 1, False, None, None)[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


RANDOM = {
    "rope": GPTArchitecture(
        num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, vocab_size=300,
        max_position_embeddings=64, init_method_std=0.2,
    ),
    "learned_positions_tied_gelu_layernorm": GPTArchitecture(
        num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, vocab_size=300,
        max_position_embeddings=64, normalization="LayerNorm", activation="gelu_tanh", add_bias_linear=True,
        position_embedding_type="learned_absolute", share_embeddings_and_output_weights=True, init_method_std=0.2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize(
    ("tp", "pp", "first_stage"), [(2, 1, None), (1, 2, None), (1, 2, 3), (2, 2, None), (4, 1, None)]
)
def test_random_initialisation_is_the_same_model_under_every_layout(
    name: str, tp: int, pp: int, first_stage: int | None, run_ranks: Callable[..., list[Any]]
) -> None:
    if RANDOM[name].num_query_groups % tp:
        pytest.skip("fewer query groups than tensor ranks are refused")
    tokens = _tokens(300)
    alone = run_ranks(1, _run, RANDOM[name], None, tokens, 1, 1, False, None, 5)[0]
    found = run_ranks(tp * pp, _run, RANDOM[name], None, tokens, tp, pp, tp > 1, first_stage, 5)[0]
    assert alone.std() > 0.1
    torch.testing.assert_close(found, alone, atol=1e-4, rtol=0)


def _run(architecture, path, tokens, tp, pp, sequence_parallel, first_stage, seed):
    return full_logits(
        architecture, path, tokens, tp=tp, pp=pp, sequence_parallel=sequence_parallel, first_stage=first_stage,
        seed=seed,
    )  # fmt: skip
