"""Which optional accelerations are here, and why another is not."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass

import torch

from megakd.common.errors import UserError


@dataclass(frozen=True)
class Accelerations:
    """For each optional package: None where it is usable, else the reason it is not."""

    transformer_engine: str | None
    apex: str | None
    triton: str | None

    def describe(self) -> str:
        """One line for the log."""
        reasons = {"Transformer Engine": self.transformer_engine, "Apex": self.apex, "Triton": self.triton}
        active = [name for name, reason in reasons.items() if reason is None]
        absent = [f"{name} ({reason})" for name, reason in reasons.items() if reason is not None]
        parts = [f"active: {', '.join(active)}" if active else "none active"]
        if absent:
            parts.append(f"not active: {', '.join(absent)}")
        return "accelerations " + "; ".join(parts)


def detect_accelerations() -> Accelerations:
    """Look for Transformer Engine, NVIDIA Apex and Triton without failing on a broken installation."""
    if not torch.cuda.is_available():
        gpu: str | None = "no GPU"
        return Accelerations(gpu, gpu, gpu)
    apex = _why_not("apex", "apex.multi_tensor_apply")
    if apex is not None and importlib.util.find_spec("apex") is not None:
        apex = "the installed package named apex is not NVIDIA Apex"
    engine = _why_not("transformer_engine", "transformer_engine.pytorch")
    return Accelerations(engine, apex, _why_not("triton", "triton"))


def resolve_layer_spec(name: str, accelerations: Accelerations) -> str:
    """Turn `auto` into the spec that is installed.

    Raises:
        UserError: Transformer Engine is asked for and not usable.
    """
    if name == "auto":
        return "local" if accelerations.transformer_engine else "transformer_engine"
    if name == "transformer_engine" and accelerations.transformer_engine:
        raise UserError(
            f"run.layer_spec is transformer_engine, which is not usable here ({accelerations.transformer_engine}); "
            "it must be installed on a machine with a GPU. Use local or auto."
        )
    return name


def _why_not(package: str, module: str) -> str | None:
    try:
        if importlib.util.find_spec(package) is None:
            return "not installed"
        importlib.import_module(module)
    except Exception as error:  # a broken binary build raises anything from ImportError to OSError
        return f"does not import: {type(error).__name__}"
    return None
