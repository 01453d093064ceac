"""Device, backend and place of this process; the only module that reads the launcher's environment."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache

import torch
import torch.distributed as dist

from megakd.platform import cpu_substitutes
from megakd.platform.memory import MemoryMeter
from megakd.platform.step_clock import DeviceMarks, StepClock

DEFAULT_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Platform:
    """Where this process computes and how it talks to the others."""

    device: torch.device
    backend: str

    @property
    def is_cuda(self) -> bool:
        """Whether tensors live on a GPU."""
        return self.device.type == "cuda"

    @property
    def compute_capability(self) -> float | None:
        """The GPU's, 9.0 for Hopper; None on CPU."""
        if not self.is_cuda:
            return None
        major, minor = torch.cuda.get_device_capability(self.device)
        return major + minor / 10

    def synchronize(self) -> None:
        """Wait for the device; a no-op on CPU."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def memory_meter(self) -> MemoryMeter:
        """A meter of this process's memory, from now on."""
        return MemoryMeter(self.device)

    def step_clock(self) -> StepClock:
        """A clock that tells what the device is doing."""
        if not self.is_cuda:
            return StepClock()
        return StepClock(DeviceMarks(lambda: torch.cuda.Event(enable_timing=True), self.synchronize))


@lru_cache(maxsize=1)
def build_platform() -> Platform:
    """Choose the device once for this process."""
    prepare_megatron()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return Platform(device, "nccl")
    return Platform(torch.device("cpu"), "gloo")


@lru_cache(maxsize=1)
def prepare_megatron() -> None:
    """Make megatron-core importable here; every package that imports it calls this first. Touches no GPU.

    Its import-time warnings about absent accelerations are silenced, since `detect_accelerations` says the same once,
    and without a GPU the substitutes that it needs are applied (see cpu_substitutes).
    """
    _silence_megatron()
    if not torch.cuda.is_available():
        cpu_substitutes.apply_cpu_substitutes()


def init_distributed(platform: Platform, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
    """Join torchrun's process group, or make a group of one where the process was started by hand.

    Does nothing where torch.distributed is already initialised. `timeout` is that of the world's communication alone;
    other groups have their own.
    """
    if dist.is_initialized():
        return
    if is_launched():
        dist.init_process_group(platform.backend, timeout=timeout)
    else:
        dist.init_process_group(platform.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def is_launched() -> bool:
    """Whether torchrun, or something like it, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launcher_store(timeout: timedelta = DEFAULT_TIMEOUT) -> tuple[dist.Store, int, int]:
    """The store through which torchrun's ranks find each other, and this process's rank and their number."""
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    return store, rank, size


def shutdown_distributed() -> None:
    """Leave the process group if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _silence_megatron() -> None:
    # Advice to megatron-core's developers, repeated on every rank: what is not installed, what newer torch renames.
    for message in (
        r".*(?:[Tt]ransformer[ _][Ee]ngine|[Aa]pex|nvidia-modelopt|flash_mla|CUDA_DEVICE_MAX_CONNECTIONS).*",
        r".*torch\.distributed\.\w+` is deprecated.*",
        r"`load_state_dict` is deprecated.*",
        r"Please use DTensor instead.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    for name in ("megatron.core", "megatron", "torch.distributed.elastic.multiprocessing.redirects"):
        logging.getLogger(name).setLevel(logging.ERROR)
