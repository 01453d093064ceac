"""The machine a process runs on: cuda/nccl or cpu/gloo, chosen once. Import before megatron-core."""

from megakd.platform.accelerations import Accelerations, detect_accelerations, resolve_layer_spec
from megakd.platform.device import (
    Platform,
    build_platform,
    init_distributed,
    is_launched,
    launcher_store,
    prepare_megatron,
    shutdown_distributed,
)
from megakd.platform.gpu_environment import communication_timeout, gpu_environment, lowest_compute_capability
from megakd.platform.memory import MemoryMeter
from megakd.platform.step_clock import NOT_TIMED, StepClock
from megakd.platform.worlds import Joint, join_sides

__all__ = [
    "NOT_TIMED",
    "Accelerations",
    "Joint",
    "MemoryMeter",
    "Platform",
    "StepClock",
    "build_platform",
    "communication_timeout",
    "detect_accelerations",
    "gpu_environment",
    "init_distributed",
    "is_launched",
    "join_sides",
    "launcher_store",
    "lowest_compute_capability",
    "prepare_megatron",
    "resolve_layer_spec",
    "shutdown_distributed",
]
