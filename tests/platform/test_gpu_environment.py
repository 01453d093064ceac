"""The environment of ranks on GPUs, and after how long communication gives up. Pure functions: no GPU is asked."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from megakd.platform.gpu_environment import communication_timeout, gpu_environment, lowest_compute_capability

HOPPER: dict[str, Any] = {
    "compute_capability": 9.0, "tensor_model_parallel_size": 8, "hang_timeout_seconds": 1800.0, "interface": "ib0",
}  # fmt: skip


def test_all_that_is_set() -> None:
    assert gpu_environment({"PATH": "/bin"}, **HOPPER) == (
        {
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "2100",
            "NCCL_SOCKET_IFNAME": "=ib0",
        },
        "GPU environment: set CUDA_DEVICE_MAX_CONNECTIONS=1, TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=2100, "
        "NCCL_SOCKET_IFNAME==ib0",
    )


def test_what_the_user_set_stays() -> None:
    theirs = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "NCCL_SOCKET_IFNAME": "eth"}
    variables, line = gpu_environment(theirs, **HOPPER)
    assert variables == {"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "2100"}
    assert line == (
        "GPU environment: set TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=2100; kept as you set them "
        "CUDA_DEVICE_MAX_CONNECTIONS=32, NCCL_SOCKET_IFNAME=eth"
    )


@pytest.mark.parametrize(
    ("settings", "absent"),
    [
        ({"tensor_model_parallel_size": 1}, "CUDA_DEVICE_MAX_CONNECTIONS"),
        ({"compute_capability": 10.0}, "CUDA_DEVICE_MAX_CONNECTIONS"),
        ({"hang_timeout_seconds": None}, "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"),
        ({"interface": None}, "NCCL_SOCKET_IFNAME"),
    ],
)
def test_what_is_set_only_where_it_is_needed(settings: dict[str, Any], absent: str) -> None:
    everything, _ = gpu_environment({}, **HOPPER)
    variables, line = gpu_environment({}, **(HOPPER | settings))
    assert everything.keys() - variables.keys() == {absent}
    assert absent not in line


def test_an_unknown_gpu_is_taken_for_one_that_needs_it() -> None:
    assert "CUDA_DEVICE_MAX_CONNECTIONS" in gpu_environment({}, **(HOPPER | {"compute_capability": None}))[0]


def test_nothing_to_set() -> None:
    nothing = HOPPER | {"tensor_model_parallel_size": 1, "hang_timeout_seconds": None, "interface": None}
    assert gpu_environment({}, **nothing) == ({}, "GPU environment: nothing to set")


@pytest.mark.parametrize("seconds", [0.5, 60, 1800, 7200])
def test_the_watchdog_is_the_first_to_give_up(seconds: float) -> None:
    from megakd.common.watchdog import GRACE_SECONDS

    assert communication_timeout(seconds).total_seconds() > seconds + 2 * GRACE_SECONDS


def test_without_a_watchdog_communication_waits() -> None:
    assert communication_timeout(None) >= timedelta(days=1)


@pytest.mark.parametrize(("told", "lowest"), [("9.0\n", 9.0), ("10.0\n9.0\n8.6\n", 8.6), ("[N/A]\n", None), ("", None)])
def test_the_capability_is_asked_of_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str, lowest: float | None
) -> None:
    (tmp_path / "answer").write_text(told)
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        f"#!/bin/sh\n[ \"$*\" = '--query-gpu=compute_cap --format=csv,noheader' ] && cat {tmp_path}/answer\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    assert lowest_compute_capability() == lowest
    tool.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert lowest_compute_capability() is None


def timeouts_of_a_runs_groups(hang_timeout_seconds: float) -> set[timedelta]:
    from megakd.config.load import config_from_dict
    from megakd.training.build import build_meshes
    from tests.config.examples import values

    sections = {"safeguards": {"hang_timeout_seconds": hang_timeout_seconds}}
    student, teacher = build_meshes(config_from_dict(values(parallel__tensor_model_parallel_size=2, **sections)))
    assert teacher is not None
    groups = [mesh.groups for mesh in (student, teacher)]
    found = [group for mesh in groups for group in (mesh.tp, mesh.pp, mesh.dp, mesh.mp, mesh.intra_dist_opt, mesh.ep)]
    return {group._get_backend(torch.device("cpu")).options._timeout for group in found}


def test_the_groups_of_a_run_wait_longer_than_its_watchdog(run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(2, timeouts_of_a_runs_groups, 5000.0) == [{timedelta(seconds=5300)}] * 2
