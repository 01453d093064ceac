"""The machine a process runs on: cuda/nccl or cpu/gloo, chosen once. Import before megatron-core."""

from megakd.platform.accelerations import Accelerations, detect_accelerations, resolve_layer_spec
from megakd.platform.device import (
    Platform,
    build_platform,
    init_distributed,
    prepare_megatron,
    shutdown_distributed,
)

__all__ = [
    "Accelerations",
    "Platform",
    "build_platform",
    "detect_accelerations",
    "init_distributed",
    "prepare_megatron",
    "resolve_layer_spec",
    "shutdown_distributed",
]
