"""Packed sequences give each example the logits it has alone, under every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from megakd.config.architecture import GPTArchitecture
from megakd.convert.hf_config import architecture_from_hf
from megakd.data.batches import collate
from megakd.data.examples import Examples, ExampleSamples
from tests.data.example_files import write_examples
from tests.models.forward import full_logits
from tests.models.test_logits import TEACHER

LENGTH = 48
SIZES = [7, 30, 2, 17, 49, 12, 3, 25, 9]
SHAPE = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "vocab_size": 300,
         "max_position_embeddings": 64, "init_method_std": 0.1}  # fmt: skip
MODELS = {
    "rope_grouped_queries": GPTArchitecture(num_query_groups=2, **SHAPE),
    "learned_positions": GPTArchitecture(
        normalization="LayerNorm", activation="gelu_tanh", add_bias_linear=True,
        position_embedding_type="learned_absolute", share_embeddings_and_output_weights=True, **SHAPE,
    ),
    "window_and_head_norms": GPTArchitecture(
        num_query_groups=2, sliding_window=5, qk_layernorm=True, rotary_percent=0.5, **SHAPE
    ),
    "experts": GPTArchitecture(num_moe_experts=4, **SHAPE),
}  # fmt: skip


def packed_batches(folder: Path, vocab_size: int) -> tuple[list[dict[str, torch.Tensor]], list[list[int]]]:
    """Microbatches of two packed samples each, and the examples' token ids but for their last, in that order."""
    draw = np.random.default_rng(1)
    examples = [(draw.integers(vocab_size, size=size).tolist(), [0, *[2] * (size - 1)]) for size in SIZES]
    read = Examples(write_examples(folder / "packed", examples), "all")
    samples = ExampleSamples(read, range(len(read)), LENGTH, truncation="drop", packing=True)
    ids = [i % samples.num_samples for i in range(4)]
    batches = [collate(samples, ids[:2]), collate(samples, ids[2:])]
    by_start = {tuple(example[:-1]): example[:-1] for example, _ in examples}
    alone = []
    for batch in batches:
        ends = batch["cu_seqlens"].tolist()
        for start, stop in zip(ends, ends[1:], strict=False):
            segment = tuple(batch["tokens"][0, start:stop].tolist())
            alone.append(by_start[segment] if segment in by_start else list(segment))
    assert {len(segment) for segment in alone} >= {size - 1 for size in SIZES}
    return batches, alone


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_packed_logits_are_those_of_each_example_alone(
    name: str, tp: int, pp: int, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    batches, alone = packed_batches(tmp_path, 300)
    expected = run_ranks(1, _alone, MODELS[name], alone)[0]
    for sequence_parallel in [False, True] if tp > 1 else [False]:
        found = run_ranks(tp * pp, _packed, MODELS[name], None, batches, tp, pp, sequence_parallel)
        for logits in found:
            torch.testing.assert_close(logits.flatten(0, 1), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_packed_logits_are_those_of_transformers(
    tp: int, pp: int, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    architecture = architecture_from_hf(TEACHER)
    batches, alone = packed_batches(tmp_path, architecture.vocab_size)
    model = LlamaForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([ids])).logits[0] for ids in alone])
    found = run_ranks(tp * pp, _packed, architecture, str(TEACHER), batches, tp, pp, False)
    for logits in found:
        torch.testing.assert_close(logits.flatten(0, 1), expected, atol=1e-4, rtol=0)


def _packed(
    architecture: GPTArchitecture, path: str | None, batches: list[Any], tp: int, pp: int, sequence_parallel: bool
) -> torch.Tensor:
    return full_logits(
        architecture, path, batches, tp=tp, pp=pp, sequence_parallel=sequence_parallel,
        seed=7 if path is None else None,
    )  # fmt: skip


def _alone(architecture: GPTArchitecture, examples: list[list[int]]) -> torch.Tensor:
    return torch.cat([
        full_logits(architecture, None, torch.tensor([ids]), tp=1, pp=1, seed=7)[0] for ids in examples
    ])  # fmt: skip
