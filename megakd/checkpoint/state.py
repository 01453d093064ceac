"""Student and optimizer as megatron-core's sharded state, loadable under any TP x PP x DP."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megakd.checkpoint.optimizer_state import create_optimizer_state, load_optimizer_state
from megakd.common.errors import UserError
from megakd.models.parameters import unwrapped
from megakd.parallel.mesh import ModelMesh
from megakd.torch_dist import check_pickles


def load_state(path: Path, model: torch.nn.Module, optimizer: MegatronOptimizer | None, mesh: ModelMesh) -> None:
    """Fill the model, and the optimizer where one is given, from a checkpoint of any layout. Collective.

    Raises:
        UserError: it does not fit, or holds what may run code when loaded.
    """
    # megatron-core unpickles what it finds. Every rank looks for itself, and all come to the same.
    check_pickles(path)
    if optimizer is not None:
        create_optimizer_state(optimizer)
    state = sharded_state(model, optimizer, mesh, is_loading=True)
    try:
        loaded = dist_checkpointing.load(state, str(path))
    except (CheckpointException, CheckpointingException) as error:
        reason = re.search(r"(?:\w*Error|\w*Exception|mismatch)[^\n]*mismatch[^\n]*", str(error))
        detail = " ".join((reason[0] if reason else str(error).strip().splitlines()[-1]).split())[:300]
        raise UserError(
            f"{path} does not fit this model ({detail}). Train the model it was written from, set "
            "checkpoint.resume=false to start over, or give another run.output_dir."
        ) from error
    unwrapped(model).load_state_dict(loaded["model"])
    if optimizer is not None:
        load_optimizer_state(optimizer, loaded["optimizer"])


def sharded_state(
    model: torch.nn.Module, optimizer: MegatronOptimizer | None, mesh: ModelMesh, *, is_loading: bool
) -> dict[str, Any]:
    """What a checkpoint holds of the model, and of the optimizer where one is given; tensors are the live ones."""
    # The mesh's own groups: replica ids taken from megatron-core's global state would be another model's.
    metadata = {
        "dp_cp_group": mesh.groups.dp_cp,
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
    }
    weights = unwrapped(model).sharded_state_dict(metadata=metadata)
    state = {"model": weights}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
    return state
