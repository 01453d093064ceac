"""The dense losses' elementwise work on GPU as Triton kernels; `kernels.work` imports triton, this module does not."""

from __future__ import annotations

import importlib.util

import torch

__all__ = ["kernels_available"]


def kernels_available(device: torch.device) -> bool:
    """Whether `TritonWork` can run on tensors of `device`: a CUDA device, with triton installed (not imported)."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None
