"""What a gradient must not depend on, and what bf16 and overlap must not spoil."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.layout_run import gather_gradients
from tests.training.runs import SEQUENCE, build, layout, run_values, write_run_files

GLOBAL_BATCH = 8


def masked_gradient(values: dict[str, Any], mask: torch.Tensor) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Sums and gradient of the first global batch, sample i of it with row i of the mask."""
    run = build(values)
    batches = run.batches()
    microbatches = batches.microbatches(0)
    batches.close()
    size, mesh = run.config.data.micro_batch_size, run.mesh
    for m, batch in enumerate(microbatches):
        start = (m * mesh.dp_size + mesh.dp_rank) * size
        batch["loss_mask"] = mask[start : start + size].clone()
    sums = run.accumulate(microbatches)
    return sums, gather_gradients(run.student)


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [(1, {"data__micro_batch_size": 1}), (1, {"data__micro_batch_size": 8}), (2, {}),
     (2, layout(1, 2, data__micro_batch_size=4)), (2, layout(2, 1, parallel__sequence_parallel=True))],
    ids=["microbatches_of_1", "one_microbatch", "dp2", "pp2", "tp2"],
)  # fmt: skip
def test_gradient_does_not_depend_on_how_the_batch_is_cut(
    world_size: int, settings: dict[str, Any], tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    folder = write_run_files(tmp_path)
    generator = torch.Generator().manual_seed(0)
    # Samples with few and many tokens that count, and two microbatches without any.
    share = torch.tensor([0.0, 0.0, 0.05, 1.0, 0.5, 0.9, 0.0, 0.3]).unsqueeze(1)
    mask = (torch.rand(GLOBAL_BATCH, SEQUENCE, generator=generator) < share).float()
    expected_sums, expected = run_ranks(1, masked_gradient, run_values(folder), mask)[0]
    sums, found = run_ranks(world_size, masked_gradient, run_values(folder, **settings), mask)[0]
    assert sums == pytest.approx(expected_sums, rel=1e-6)
    assert sums[3] == mask.sum().item()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() / gradient.norm() < 2e-6, name


def test_a_batch_in_which_nothing_counts_gives_zero(tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    mask = torch.zeros(GLOBAL_BATCH, SEQUENCE)
    sums, gradient = run_ranks(1, masked_gradient, run_values(write_run_files(tmp_path)), mask)[0]
    assert sums == [0.0, 0.0, 0.0, 0.0]
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradient.values())


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (1, 2), (2, 2)])
def test_tied_head_in_bf16_is_accumulated_in_fp32(
    tp: int, pp: int, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    folder = write_run_files(tmp_path, tied=True)
    mask = torch.ones(GLOBAL_BATCH, SEQUENCE)
    many = {"data__micro_batch_size": 1}
    _, expected = run_ranks(1, masked_gradient, run_values(folder, **many), mask)[0]
    _, found = run_ranks(
        tp * pp, masked_gradient, run_values(folder, **layout(tp, pp), **many, run__dtype="bf16"), mask
    )[0]
    name = "model.embed_tokens.weight"
    assert found[name].dtype is torch.float32
    difference = (found[name] - expected[name]).norm() / expected[name].norm()
    # bf16 has 8 bits: the activations' rounding alone is some 2^-8 per operation, far from a factor or a lost share.
    assert difference < 0.03, f"{difference:.3f}"


def trained(values: dict[str, Any], steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    from megakd.models.parameters import canonical_parameters
    from megakd.training.export import parameters_gathered

    run = build(values)
    losses = run.train(0, steps)
    with parameters_gathered(run.student.model):
        return losses, {name: p.detach().clone() for name, p in canonical_parameters(run.student.model).items()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_overlapped_gathering_never_uses_a_stale_parameter(
    dtype: str, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    folder = write_run_files(tmp_path, tied=True)
    plain = run_values(folder, run__dtype=dtype, optimizer__use_distributed_optimizer=True)
    overlapped = {
        **plain,
        "optimizer": {**plain["optimizer"], "overlap_grad_reduce": True, "overlap_param_gather": True},
    }
    expected_losses, expected = run_ranks(2, trained, plain, 4)[0]
    losses, found = run_ranks(2, trained, overlapped, 4)[0]
    assert losses == expected_losses
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter), name


def test_bf16_learns_as_fp32_does(tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    folder = write_run_files(tmp_path)
    settings = {"optimizer__use_distributed_optimizer": True}
    exact, _ = run_ranks(2, trained, run_values(folder, **settings), 8)[0]
    losses, parameters = run_ranks(2, trained, run_values(folder, **settings, run__dtype="bf16"), 8)[0]
    assert all(parameter.dtype is torch.bfloat16 for parameter in parameters.values())
    assert losses[-1] < 0.9 * losses[0]
    assert losses == pytest.approx(exact, rel=0.01)
