"""A student and a teacher with experts against a plain transformers loop in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import MixtralConfig, Qwen3MoeConfig

from tests.training import reference
from tests.training.layout_run import Layout, run_layout
from tests.training.test_against_transformers import Case, assert_same_run

LAYOUTS = {
    "one_rank": Layout(1),
    "tp2_sequence_parallel": Layout(2, tp=2, sequence_parallel=True, micro_batch_size=4),
    "pp2": Layout(2, pp=2, micro_batch_size=1),
    "dp2_distributed_optimizer": Layout(2, distributed_optimizer=True, overlap=True),
    "tp2_pp2_sequence_parallel_recompute": Layout(4, tp=2, pp=2, sequence_parallel=True, recompute="full"),
}
SIZES = {
    "vocab_size": reference.VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0,
    "initializer_range": 0.1, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class ExpertCase(Case):
    def __init__(self, folder: Path) -> None:
        self.student, self.teacher = folder / "student", folder / "teacher"
        experts = {"moe_intermediate_size": 24, "num_experts": 6, "norm_topk_prob": False}
        reference.save_random(self.student, Qwen3MoeConfig(num_hidden_layers=4, head_dim=16, **experts, **SIZES), 1)
        reference.save_random(self.teacher, MixtralConfig(num_hidden_layers=2, num_local_experts=4, **SIZES), 2)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExpertCase, reference.ReferenceRun]:
    case = ExpertCase(tmp_path_factory.mktemp("experts"))
    return case, case.reference_run("forward_kl")


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_as_transformers_does(
    case: tuple[ExpertCase, reference.ReferenceRun], name: str, run_ranks: Callable[..., list[Any]]
) -> None:
    models, expected = case
    layout = LAYOUTS[name]
    result = run_ranks(layout.world_size, run_layout, layout, str(models.student), str(models.teacher))[0]
    assert_same_run(result, expected)


def test_reference_learns(case: tuple[ExpertCase, reference.ReferenceRun]) -> None:
    assert case[1].losses[-1] < 0.9 * case[1].losses[0]
