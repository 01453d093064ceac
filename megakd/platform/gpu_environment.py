"""What ranks on GPUs need in their environment before CUDA and NCCL start in them."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from datetime import timedelta

# On Blackwell, of compute capability 10, kernels of several queues keep the order that megatron-core wants.
_BLACKWELL = 10.0
_MARGIN_SECONDS = 300.0
_LEAST_SECONDS = 1800.0
_NEVER = timedelta(days=30)


def communication_timeout(hang_timeout_seconds: float | None) -> timedelta:
    """After how long gloo and NCCL give up: later than the watchdog, which says more than they can.

    Args:
        hang_timeout_seconds: the watchdog's; None where it never ends a run.
    """
    if hang_timeout_seconds is None:
        return _NEVER
    return timedelta(seconds=max(hang_timeout_seconds + _MARGIN_SECONDS, _LEAST_SECONDS))


def gpu_environment(
    environment: Mapping[str, str] | None = None,
    *,
    compute_capability: float | None,
    tensor_model_parallel_size: int,
    hang_timeout_seconds: float | None,
    interface: str | None = None,
) -> tuple[dict[str, str], str]:
    """What to set for ranks on GPUs that `environment` (default: the process's) does not have, and a line that says so.

    Args:
        compute_capability: the lowest of the node's GPUs, 9.0 for Hopper; None where it is not known.
        interface: the network interface through which other nodes reach this one; None where there are none.
    """
    environment = os.environ if environment is None else environment
    wanted = {}
    if tensor_model_parallel_size > 1 and (compute_capability or 0.0) < _BLACKWELL:
        wanted["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if hang_timeout_seconds is not None:
        seconds = communication_timeout(hang_timeout_seconds).total_seconds()
        wanted["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] = f"{seconds:.0f}"
    if interface is not None:
        wanted["NCCL_SOCKET_IFNAME"] = f"={interface}"  # exactly this one, not all whose names begin so
    added = {name: value for name, value in wanted.items() if name not in environment}
    kept = {name: environment[name] for name in wanted if name in environment}
    parts = [
        f"{what} {', '.join(f'{name}={value}' for name, value in variables.items())}"
        for what, variables in (("set", added), ("kept as you set them", kept))
        if variables
    ]
    return added, f"GPU environment: {'; '.join(parts) or 'nothing to set'}"


def lowest_compute_capability() -> float | None:
    """That of this node's GPUs, asked of nvidia-smi so that CUDA does not start here; None where it does not tell."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return min((float(found) for found in re.findall(r"^\s*(\d+\.\d+)\s*$", told, flags=re.MULTILINE)), default=None)
