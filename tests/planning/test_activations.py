"""What a layer keeps for backward is what autograd was seen to save."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megakd.config.architecture import GPTArchitecture
from megakd.planning.activations import layer_bytes, layer_rotary_bytes
from tests.planning.jobs import STUDENT, build_test_job

BATCH, LENGTH = 2, 64
SHAPES: dict[str, dict[str, Any]] = {
    "grouped_queries": {},
    "all_heads": {"num_query_groups": 8},
    "head_norms_and_biases": {"qk_layernorm": True, "add_qkv_bias": True},
    "layer_norm_and_gelu": {
        "normalization": "LayerNorm", "activation": "gelu", "add_bias_linear": True, "num_query_groups": 8,
    },
    "learned_positions": {"position_embedding_type": "learned_absolute", "num_query_groups": 8},
    "partly_turned": {"rotary_percent": 0.5},
}  # fmt: skip
CASES = [
    *((name, "fp32", "none", 1, False) for name in SHAPES),
    *(("grouped_queries", "bf16", recompute, 1, False) for recompute in ("none", "selective", "full")),
    *((name, "bf16", "none", 1, False) for name in ("layer_norm_and_gelu", "head_norms_and_biases")),
    ("grouped_queries", "fp32", "none", 2, False),
    ("grouped_queries", "bf16", "none", 2, True),
    ("head_norms_and_biases", "fp32", "selective", 2, True),
    ("grouped_queries", "fp32", "full", 2, True),
]


def saved_bytes(shape: dict[str, Any], dtype: str, recompute: str, sequence_parallel: bool) -> list[int]:
    """Bytes of the storages that autograd saves in a forward pass of models of 1 and of 2 layers."""
    import torch.distributed as dist

    from megakd.models.gpt import build_gpt
    from megakd.parallel.mesh import GroupPool, build_model_mesh
    from megakd.parallel.random_state import seed_megatron

    mesh = build_model_mesh(GroupPool(), tensor_model_parallel_size=dist.get_world_size())
    seed_megatron(1, mesh)
    totals = []
    for layers in (1, 2):
        architecture = GPTArchitecture(**(STUDENT | shape | {"num_layers": layers}))
        model = build_gpt(
            architecture, mesh, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16, layer_spec="local", seed=1,
            recompute_granularity=recompute, sequence_parallel=sequence_parallel,
        )  # fmt: skip
        storages = {}
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def keep(tensor, storages=storages):  # type: ignore[no-untyped-def]
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage  # held, so that none takes another's place
            return tensor

        tokens = torch.zeros((BATCH, LENGTH), dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(tokens, torch.arange(LENGTH).repeat(BATCH, 1), None)
        totals.append(sum(s.nbytes() for place, s in storages.items() if place not in parameters))
    return totals


@pytest.mark.parametrize(("shape", "dtype", "recompute", "tp", "sequence_parallel"), CASES)
def test_a_layer_keeps_what_autograd_saves(run_ranks, shape, dtype, recompute, tp, sequence_parallel):
    job = build_test_job(
        tp, shape=SHAPES[shape], run__dtype=dtype, student__recompute_granularity=recompute,
        parallel__tensor_model_parallel_size=tp, parallel__sequence_parallel=sequence_parallel,
        data__sequence_length=LENGTH, data__micro_batch_size=BATCH,
    )  # fmt: skip
    expected = BATCH * LENGTH * layer_bytes(job, job.student, recompute=recompute)
    expected += LENGTH * layer_rotary_bytes(job, job.student, recompute=recompute)
    for one, two in run_ranks(tp, saved_bytes, SHAPES[shape], dtype, recompute, sequence_parallel):
        assert two - one == pytest.approx(expected, rel=2e-3)


def test_kernels_that_keep_the_input_alone_need_less():
    on_cpu, on_gpu = (build_test_job(device_type=kind, run__dtype="bf16") for kind in ("cpu", "cuda"))
    # Korthikanti et al. count 34 bytes per token and hidden element of a GPT-3 layer with dropout; without dropout's
    # masks and with the inputs of both norms, Llama's has 2 (norm in, norm out) x 2, the attention's and the MLP's.
    h, f, q, kv = 256, 512, 256, 128
    attention = 2 * (q + 2 * kv) + 2 * (q + kv) + 2 * q + 4 * 8
    assert layer_bytes(on_gpu, on_gpu.student) == 2 * (2 * h + 4 + 2 * h) + attention + 2 * 5 * f
    assert layer_bytes(on_cpu, on_cpu.student) > layer_bytes(on_gpu, on_gpu.student)
