"""megakd: distil large GPT models into small ones with Megatron-style parallelism."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megakd._version import __version__

if TYPE_CHECKING:
    from megakd.config.load import load_config
    from megakd.training import DistillResult, distill, write_cache

__all__ = ["DistillResult", "__version__", "distill", "load_config", "write_cache"]


def __getattr__(name: str) -> Any:
    # torch and megatron-core are imported only by who trains: `config` and `--help` answer at once.
    if name == "load_config":
        from megakd.config.load import load_config

        return load_config
    if name in ("DistillResult", "distill", "write_cache"):
        from megakd import training

        return getattr(training, name)
    raise AttributeError(f"module 'megakd' has no attribute {name!r}")
