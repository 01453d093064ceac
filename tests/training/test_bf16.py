"""bf16 weights over fp32 main weights that the data ranks share out among them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.runs import build, layout, run_values, write_run_files

SETTINGS = layout(
    run__dtype="bf16", optimizer__use_distributed_optimizer=True, optimizer__overlap_grad_reduce=True,
    optimizer__overlap_param_gather=True,
)  # fmt: skip
STEPS = 20
Shard = tuple[int, int, torch.Tensor]


def train_and_export(values: dict[str, Any]) -> tuple[list[float], dict[str, Shard], dict[str, torch.Size]]:
    """Losses; this rank's fp32 main weights as (start, stop, values) of the flat parameter; shapes."""
    from megakd.models.parameters import canonical_parameters
    from megakd.training.export import export_student

    run = build(values)
    losses = run.train(0, STEPS)
    export_student(run.config, run.student)
    (inner,) = run.optimizer.chained_optimizers
    names = {parameter: name for name, parameter in canonical_parameters(run.student.model).items()}
    shards: dict[str, Shard] = {}
    for parameters, mains in zip(inner.model_float16_groups, inner.shard_fp32_from_float16_groups, strict=True):
        for parameter, main in zip(parameters, mains, strict=True):
            place = inner._get_model_param_range_map(parameter)["param"]
            assert main.dtype is torch.float32 and parameter.dtype is torch.bfloat16
            shards[names[parameter]] = (place.start, place.end, main.detach().clone())
    return losses, shards, {name: parameter.shape for parameter, name in names.items()}


def test_bf16_trains_and_exports_its_main_weights_rounded(tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    from megakd.convert.families.llama import LLAMA
    from megakd.convert.hf_config import architecture_from_hf

    values = run_values(write_run_files(tmp_path, samples=STEPS * 8), **SETTINGS)
    results = run_ranks(2, train_and_export, values)
    losses, _, shapes = results[0]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])

    architecture = architecture_from_hf(tmp_path / "student")
    exported = load_file(tmp_path / "run" / "student" / "model.safetensors")
    unrounded = 0
    for name, shape in shapes.items():
        full = torch.full([shape.numel()], torch.nan)
        for _, shards, _ in results:
            if name in shards:
                start, stop, main = shards[name]
                assert full[start:stop].isnan().all(), f"two ranks hold {name}"
                full[start:stop] = main
        unrounded += int((full != full.bfloat16().float()).sum())
        for hf_name, _, weight in LLAMA.export(name, full.view(shape), architecture):
            assert torch.equal(exported.pop(hf_name), weight.bfloat16()), hf_name
    assert not exported
    total = sum(shape.numel() for shape in shapes.values())
    assert unrounded > 0.5 * total  # the main weights hold what bf16 cannot (norms and untouched rows aside)


def losses_of(values: dict[str, Any]) -> list[float]:
    return build(values).train(0, 8)


def test_bf16_learns_as_fp32_does(tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    folder = write_run_files(tmp_path)
    exact = run_ranks(2, losses_of, run_values(folder, **(SETTINGS | {"run__dtype": "fp32"})))[0]
    assert run_ranks(2, losses_of, run_values(folder, **SETTINGS))[0] == pytest.approx(exact, rel=0.01)
