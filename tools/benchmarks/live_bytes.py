"""Bytes of all tensors alive in a process, whichever thread lets go of them.

The profiler's memory events leave out what gloo's threads free, so that a rank's figures would grow for ever.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside, counts the storages of operators' results from their making to their end, on the thread that is inside.

    Attributes:
        live: bytes alive now, of tensors made inside; peak: the most since `reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._held: dict[int, weakref.ref[Any]] = {}

    def reset_peak(self) -> None:
        """Begin to look for the most anew."""
        self.peak = self.live

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that were made outside, as by another thread, until their end."""
        for tensor in tensors:
            self._hold(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._hold(leaf.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._held:
            return

        def let_go(_: object) -> None:
            del self._held[key]
            self.live -= size

        self._held[key] = weakref.ref(storage, let_go)
        self.live += size
