"""Weights that wait in main memory while their model does not run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class ParkedWeights:
    """A model's parameters, on the device only inside `fetched`.

    Args:
        model: its parameters lose their storage on the device; nothing else may hold on to it.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._device = torch.cuda.current_device()
        self._parked: list[tuple[torch.nn.Parameter, Tensor]] = []
        for parameter in model.parameters():
            # A copy of its own, also where the device is main memory; pinned, so that a GPU copies it without a stop.
            kept = torch.empty_like(parameter, device="cpu", pin_memory=parameter.is_cuda, requires_grad=False)
            kept.copy_(parameter.detach())
            self._parked.append((parameter, kept))
            parameter.data = _nothing_like(parameter)

    @contextmanager
    def fetched(self) -> Iterator[None]:
        """Inside, the parameters are on the device."""
        for parameter, kept in self._parked:
            parameter.data = torch.empty_like(kept, device=self._device).copy_(kept, non_blocking=True)
        try:
            yield
        finally:
            for parameter, _ in self._parked:
                parameter.data = _nothing_like(parameter)


def _nothing_like(parameter: Tensor) -> Tensor:
    return torch.empty(0, dtype=parameter.dtype, device=parameter.device)
