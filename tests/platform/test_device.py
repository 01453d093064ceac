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


def memory_while_a_tensor_lives() -> list[tuple[int, int]]:
    import torch

    from megakd.platform import build_platform

    meter = build_platform().memory_meter()
    read = [meter.read()]
    tensor = torch.ones(read[0][1] // 4 + 25_000_000)  # more than the process ever held, and 100 MB
    read.append(meter.read())
    del tensor
    return [*read, meter.read()]


def test_memory_is_in_bytes_now_and_at_most(run_ranks: Callable[..., list[Any]]) -> None:
    (before, peak), (held, new_peak), (after, last_peak) = run_ranks(1, memory_while_a_tensor_lives)[0]
    assert 50_000_000 < before <= peak
    assert held - before >= 90_000_000 and new_peak - peak >= 90_000_000
    assert held - after >= 90_000_000 and last_peak >= new_peak


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
