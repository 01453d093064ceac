"""How much memory a process holds, by what can be measured where it computes."""

from __future__ import annotations

import resource
import sys

import psutil
import torch


class MemoryMeter:
    """Bytes allocated by torch on a GPU, resident in the process on CPU.

    Args:
        device: where the process computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._peak = 0

    def read(self) -> tuple[int, int]:
        """(bytes of late, most bytes so far). Of late is the most since the last reading on a GPU, now on CPU."""
        if self._device.type == "cuda":
            late = peak = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            late = psutil.Process().memory_info().rss
            # The kernel notes the most that was resident later and in coarser steps than what is.
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self._peak = max(self._peak, late, peak)
        return late, self._peak
