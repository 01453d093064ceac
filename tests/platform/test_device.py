"""The platform of a process, and its process group where no launcher made one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

REPOSITORY = Path(__file__).resolve().parents[2]


def platform_of_rank() -> tuple[str, str, bool, bool, int]:
    from megakd.platform import build_platform, init_distributed

    platform, world = build_platform(), dist.group.WORLD
    init_distributed(platform)  # the world is there already
    assert dist.group.WORLD is world
    platform.synchronize()
    return str(platform.device), platform.backend, platform.is_cuda, build_platform() is platform, dist.get_rank()


def test_without_a_gpu_ranks_compute_on_cpu_over_gloo(run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(2, platform_of_rank) == [("cpu", "gloo", False, True, rank) for rank in range(2)]


def peak_memory() -> tuple[int, int]:
    import torch

    from megakd.platform import build_platform

    before = build_platform().peak_memory_bytes()
    torch.ones(before // 4 + 25_000_000).sum()  # more than the process ever held, and 100 MB
    return before, build_platform().peak_memory_bytes()


def test_peak_memory_is_in_bytes(run_ranks: Callable[..., list[Any]]) -> None:
    before, after = run_ranks(1, peak_memory)[0]
    assert 50_000_000 < before and after - before >= 90_000_000


ALONE = """
import torch, torch.distributed as dist
from megakd.platform import build_platform, init_distributed, shutdown_distributed
shutdown_distributed()
init_distributed(build_platform())
total = torch.ones(2)
dist.all_reduce(total)
assert dist.get_world_size() == 1 and total.tolist() == [1.0, 1.0]
shutdown_distributed()
assert not dist.is_initialized()
compile_ = torch.compile
import sys, megatron.core.models.gpt, megatron.core.optimizer, megakd.training.loop
assert torch.compile is compile_ and compile_.__module__ == "torch" and "torch._inductor.compile_fx" not in sys.modules
print("done")
"""


def test_a_process_started_by_hand_is_a_world_of_one_and_imports_quietly() -> None:
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n"
    assert result.stderr == ""
