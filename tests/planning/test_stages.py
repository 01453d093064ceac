"""Parameters per stage are those of the models that are built."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megakd.config.architecture import GPTArchitecture
from megakd.parameters.shapes import num_parameters
from megakd.planning.stages import stage_parameters
from tests.planning.jobs import STUDENT, build_test_job


def built_parameters(shape: dict[str, Any], tp: int, pp: int, first: int | None) -> tuple[int, int, int]:
    """This rank's stage, its number of parameters, and those of the largest."""
    from megakd.models.gpt import build_gpt
    from megakd.parallel.mesh import GroupPool, build_model_mesh
    from megakd.parallel.random_state import seed_megatron

    mesh = build_model_mesh(GroupPool(), tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    seed_megatron(1, mesh)
    model = build_gpt(
        GPTArchitecture(**(STUDENT | shape)), mesh, dtype=torch.float32, layer_spec="local",
        num_layers_in_first_pipeline_stage=first, sequence_parallel=shape.get("num_moe_experts") is not None,
    )  # fmt: skip
    counts = [parameter.numel() for parameter in model.parameters()]
    return mesh.pp_rank, sum(counts), max(counts)


@pytest.mark.parametrize(
    ("shape", "tp", "pp", "first"),
    [
        ({}, 1, 1, None),
        ({"share_embeddings_and_output_weights": True}, 1, 1, None),
        ({"normalization": "LayerNorm", "qk_layernorm": True}, 1, 1, None),
        ({"share_embeddings_and_output_weights": True}, 2, 2, 5),
        ({"normalization": "LayerNorm", "activation": "gelu", "add_bias_linear": True, "vocab_size": 1000}, 2, 2, None),
        ({"position_embedding_type": "learned_absolute", "qk_layernorm": True}, 1, 4, None),
        ({"num_moe_experts": 4, "moe_ffn_hidden_size": 128}, 2, 1, None),
    ],
)
def test_parameters_of_a_rank_are_those_of_its_stage(run_ranks, shape, tp, pp, first):
    job = build_test_job(
        tp * pp, shape=shape, parallel__tensor_model_parallel_size=tp, parallel__pipeline_model_parallel_size=pp,
        parallel__num_layers_in_first_pipeline_stage=first,
        parallel__sequence_parallel=tp > 1 and "num_moe_experts" in shape,
    )  # fmt: skip
    stages = stage_parameters(job.student)
    for stage, count, largest in run_ranks(tp * pp, built_parameters, shape, tp, pp, first):
        assert (stages[stage].count, stages[stage].largest) == (count, largest)
        assert tp * pp > 1 or num_parameters(job.student.architecture) == count


def test_a_model_whose_head_lives_elsewhere_has_none():
    job = build_test_job(2, parallel__pipeline_model_parallel_size=2)
    whole, headless = stage_parameters(job.student), stage_parameters(job.student, has_head=False)
    assert whole[1].count - headless[1].count == 1024 * 256
    assert whole[0] == headless[0]
