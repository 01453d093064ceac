"""The loop, the step, and what builds them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megakd.platform import prepare_megatron

if TYPE_CHECKING:
    from megakd.training.caching import write_cache
    from megakd.training.loop import DistillResult, distill, evaluate_run

prepare_megatron()

__all__ = ["DistillResult", "distill", "evaluate_run", "write_cache"]


def __getattr__(name: str) -> Any:
    # preflight and the schedule need no megatron-core; importing the loop does.
    if name == "write_cache":
        from megakd.training.caching import write_cache

        return write_cache
    if name in __all__:
        from megakd.training import loop

        return getattr(loop, name)
    raise AttributeError(f"module 'megakd.training' has no attribute {name!r}")
