"""The machine a process runs on: cuda/nccl or cpu/gloo, chosen once. Import before megatron-core."""

from megakd.platform.accelerations import Accelerations, detect_accelerations, resolve_layer_spec
from megakd.platform.device import (
    Platform,
    build_platform,
    init_distributed,
    prepare_megatron,
    shutdown_distributed,
)
from megakd.platform.gpu_environment import communication_timeout, gpu_environment, lowest_compute_capability
from megakd.platform.memory import MemoryMeter
from megakd.platform.step_clock import NOT_TIMED, StepClock

__all__ = [
    "NOT_TIMED",
    "Accelerations",
    "MemoryMeter",
    "Platform",
    "StepClock",
    "build_platform",
    "communication_timeout",
    "detect_accelerations",
    "gpu_environment",
    "init_distributed",
    "lowest_compute_capability",
    "prepare_megatron",
    "resolve_layer_spec",
    "shutdown_distributed",
]
