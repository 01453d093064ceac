"""Timing in turn and peak bytes by allocator events, for benchmarks that compare within one process."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def interleaved_seconds(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function over `repeats` rounds, all run in every round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(repeats + 1):
        for name, function in functions.items():
            _synchronize()
            started = time.perf_counter()
            function()
            _synchronize()
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def median_ratio(a: list[float], b: list[float]) -> float:
    """Median over rounds of a / b: machine drift hits both sides of a round alike."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes of tensors alive at once inside `function`, above those alive before it."""
    if torch.cuda.is_available():
        _synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        _synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def machine() -> str:
    """Device, threads and versions, for the head of a report."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
    threads = f"{torch.get_num_threads()} thread(s)"
    return f"{device}, {threads}, torch {torch.__version__}, Python {platform.python_version()}"


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
