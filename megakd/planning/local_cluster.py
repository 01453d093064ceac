"""This machine as a cluster of one node: what it has is asked, and how fast it is is tried for a moment."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import psutil
import torch

from megakd.planning.clusters import Cluster

_SIZE = 1024
_SECONDS = 0.3


def measure_local_cluster(ranks: int | None) -> Cluster:
    """Ask and try this machine; `ranks` defaults to its GPUs, or to 1."""
    if torch.cuda.is_available():
        return _gpus(ranks or torch.cuda.device_count())
    ranks = ranks or 1
    # Ranks on CPU share cores and memory; more ranks than cores share each.
    share = min(1.0, len(os.sched_getaffinity(0)) / ranks)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
        fp32, bf16 = (_product_rate(torch.device("cpu"), dtype) * share for dtype in (torch.float32, torch.bfloat16))
        copies = _copy_rate(torch.device("cpu")) * share
    finally:
        torch.set_num_threads(threads)
    return Cluster(
        name="local", device=f"rank on this machine's {len(os.sched_getaffinity(0))} cores", device_type="cpu",
        ranks_per_node=ranks, memory_gib=psutil.virtual_memory().total / 2**30 / ranks, fp32_tflops=fp32,
        bf16_tflops=bf16, memory_gb_per_s=copies, link_gb_per_s=copies / 4, network_gb_per_s=1.0,
        product_efficiency=0.8, transfer_efficiency=1.0, reserved_gib=0.5,
    )  # fmt: skip


def _gpus(ranks: int) -> Cluster:
    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / 2**30
    return Cluster(
        name="local", device=properties.name, ranks_per_node=ranks, memory_gib=memory,
        fp32_tflops=_product_rate(device, torch.float32), bf16_tflops=_product_rate(device, torch.bfloat16),
        memory_gb_per_s=_copy_rate(device), link_gb_per_s=25.0, network_gb_per_s=3.0, product_efficiency=0.8,
        reserved_gib=0.08 * memory,
    )  # fmt: skip


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """1e12 operations per second of a product of square matrices."""
    size = _SIZE * (8 if device.type == "cuda" else 1)
    a = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _seconds(lambda: torch.mm(a, a), device) / 1e12


def _copy_rate(device: torch.device) -> float:
    """1e9 bytes per second read and written by a copy."""
    a = torch.ones(2**24, device=device)
    b = torch.empty_like(a)
    return 2 * 4 * a.numel() / _seconds(lambda: b.copy_(a), device) / 1e9


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """Of the fastest of some calls, after one that is not counted."""

    def once() -> float:
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    once()
    end, best = time.perf_counter() + _SECONDS, once()
    while time.perf_counter() < end:
        best = min(best, once())
    return best
