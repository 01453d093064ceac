"""The head's gradient in bf16 is summed in fp32, over microbatches and over a head that two stages share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.training.layout_run import gather_gradients
from tests.training.runs import SEQUENCE, build, layout, learnable_tokens, run_values, write_run_files

MICROBATCHES = 4
STAGES = {"pp1": (1, layout(run__dtype="bf16")), "pp2": (2, layout(1, 2, run__dtype="bf16"))}
LAYOUTS = STAGES | {"tp2_pp2": (4, layout(2, 2, run__dtype="bf16"))}
BF16_EPSILON = 2.0**-8


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_files(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_files(tmp_path_factory.mktemp("untied"))


def gradients_of_all_and_of_each(values: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Gradients summed over tokens: of all microbatches together, then of each by itself."""
    from megakd.data.batches import collate
    from megakd.training.train_data import open_train_data

    run = build(values)
    samples = open_train_data(run.config).samples
    microbatches = [collate(samples, [2 * m, 2 * m + 1]) for m in range(MICROBATCHES)]
    found = []
    for window in [microbatches, *([microbatch] for microbatch in microbatches)]:
        tokens = run.accumulate(window)[-1]
        found.append({name: gradient.double() * tokens for name, gradient in gather_gradients(run.student).items()})
    return found


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("head", ["model.embed_tokens.weight", "lm_head.weight"])
def test_microbatches_add_up_in_fp32(
    tied: Path, untied: Path, head: str, stages: str, run_ranks: Callable[..., list[Any]]
) -> None:
    world_size, settings = STAGES[stages]
    values = run_values(untied if head.startswith("lm_head") else tied, **settings)
    together, *each = run_ranks(world_size, gradients_of_all_and_of_each, values)[0]
    exact = sum(part[head] for part in each)
    in_bf16 = torch.zeros_like(exact, dtype=torch.bfloat16)
    for part in each:
        in_bf16 += part[head].bfloat16()
    assert relative(together[head], exact) < 1e-6
    assert relative(in_bf16, exact) > 1e-3  # what the bound above would catch


def test_a_microbatch_is_not_rounded_to_bf16(untied: Path, run_ranks: Callable[..., list[Any]]) -> None:
    """Of fp32 numbers one in 2^16 is a bf16 number by chance; of gradients that passed through bf16, all are."""
    _, first, *_ = run_ranks(1, gradients_of_all_and_of_each, run_values(untied, **STAGES["pp1"][1]))[0]
    gradient = first["lm_head.weight"].float()
    gradient = gradient[gradient != 0]
    assert len(gradient) > 1000
    assert (gradient == gradient.bfloat16().float()).float().mean() < 0.01


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_tied_head_is_within_bf16_of_fp32(tied: Path, name: str, run_ranks: Callable[..., list[Any]]) -> None:
    world_size, settings = LAYOUTS[name]
    together = run_ranks(world_size, gradients_of_all_and_of_each, run_values(tied, **settings))[0][0]
    student = LlamaForCausalLM.from_pretrained(tied / "student", dtype=torch.bfloat16).float()
    teacher = LlamaForCausalLM.from_pretrained(tied / "teacher", dtype=torch.bfloat16).float().eval()
    text = torch.from_numpy(learnable_tokens(2 * MICROBATCHES * SEQUENCE + 1))
    windows = torch.stack([text[i * SEQUENCE : i * SEQUENCE + SEQUENCE + 1] for i in range(2 * MICROBATCHES)])
    log_q = student(windows[:, :-1]).logits.log_softmax(-1)
    with torch.no_grad():
        log_p = teacher(windows[:, :-1]).logits.log_softmax(-1)
    (
        0.5 * (log_p.exp() * (log_p - log_q)).sum() - log_q.gather(-1, windows[:, 1:, None]).sum()
    ).backward()  # fmt: skip
    gradient = student.get_input_embeddings().weight.grad
    assert relative(together["model.embed_tokens.weight"], gradient) < 4 * BF16_EPSILON


def weights_after_three_steps(values: dict[str, Any], bucket_size: int) -> tuple[int, list[float], dict[str, Any]]:
    """Number of buckets, losses, weights; buckets as small as only a large model's would be in comparison."""
    from megakd.models.parameters import canonical_parameters
    from megakd.training import build as build_module
    from megakd.training.export import parameters_gathered

    ddp_config = build_module.DistributedDataParallelConfig
    build_module.DistributedDataParallelConfig = partial(ddp_config, bucket_size=bucket_size)
    try:
        run = build(values)
    finally:
        build_module.DistributedDataParallelConfig = ddp_config
    losses = run.train(0, 3)
    with parameters_gathered(run.student.model):
        weights = {name: weight.detach().clone() for name, weight in canonical_parameters(run.student.model).items()}
    return sum(len(buffer.buckets) for buffer in run.student.model.buffers), losses, weights


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_overlapped_gathering_never_uses_a_stale_head(
    tied: Path, untied: Path, head: str, dtype: str, run_ranks: Callable[..., list[Any]]
) -> None:
    folder = tied if head == "tied" else untied
    # Buckets change the order in which the norm is summed, so nothing is clipped by it.
    settings = {"run__dtype": dtype, "optimizer__use_distributed_optimizer": True, "optimizer__clip_grad": 0}
    overlap = {"optimizer__overlap_grad_reduce": True, "optimizer__overlap_param_gather": True}
    plain = run_ranks(2, weights_after_three_steps, run_values(folder, **settings), 8000)
    overlapped = run_ranks(2, weights_after_three_steps, run_values(folder, **settings, **overlap), 8000)
    for (_, expected_losses, expected), (buckets, losses, weights) in zip(plain, overlapped, strict=True):
        assert buckets > 3  # with one, everything is gathered by the first layer's hook
        assert losses == expected_losses
        assert weights.keys() == expected.keys()
        for name, weight in expected.items():
            assert torch.equal(weights[name], weight), name
