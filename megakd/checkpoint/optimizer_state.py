"""Optimizer state from a checkpoint, where torch's Adam keeps a step count per parameter.

megatron-core's distributed optimizer expects Apex's or Transformer Engine's Adam, which counts once per group. With
torch's it cannot build its state for loading, fails on the per-parameter `step`, and then shares one tensor of it.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def create_optimizer_state(optimizer: MegatronOptimizer) -> None:
    """Make the state that loading fills. Main weights may change: load the model and the optimizer afterwards."""
    inner = _only(optimizer)
    if isinstance(inner, DistributedOptimizer) and not inner.optimizer.state:
        inner._init_optimizer_states_with_dummy_values()


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Fill the optimizer from what its own sharded state dict asked for."""
    inner = _only(optimizer)
    sharded = state.pop("param_state", None)
    inner.load_state_dict(state)
    states: list[dict[str, Any]] = list(inner.optimizer.state.values())
    # One tensor for all parameters would be counted up once for each of them.
    steps = [values.pop("step").clone() if isinstance(values.get("step"), torch.Tensor) else None for values in states]
    if sharded is not None:
        inner.load_parameter_state_from_fully_reshardable(sharded)
    for values, step in zip(states, steps, strict=True):
        if step is not None:
            values["step"] = step


def _only(optimizer: MegatronOptimizer) -> Any:
    """The optimizer inside megatron-core's chain, which has one link where there are no experts."""
    (inner,) = optimizer.chained_optimizers
    return inner
