"""Student, optimizer and counters in megatron-core's torch_dist format, loadable under any TP x PP x DP."""

from __future__ import annotations

import itertools
import queue
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megakd.checkpoint.optimizer_state import create_optimizer_state, load_optimizer_state
from megakd.common.errors import UserError
from megakd.models.parameters import unwrapped
from megakd.parallel.mesh import ModelMesh
from megakd.torch_dist import check_pickles

# megatron-core serves this queue from a spawned process, for saving in the background: spawning runs a script without
# `if __name__ == "__main__"` again, and the process outlives a rank that is killed. Here a rank saves by itself.
filesystem_async._results_queue = queue.Queue()

_STEP_FOLDER = re.compile(r"step-(\d{8})")


def checkpoint_steps(folder: Path) -> dict[int, Path]:
    """Complete checkpoints under `folder` by step: a checkpoint gets its name only when all of it is written."""
    if not folder.is_dir():
        return {}
    found = {int(match[1]): path for path in folder.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name))}
    return dict(sorted(found.items()))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, if any."""
    steps = checkpoint_steps(folder)
    return steps[max(steps)] if steps else None


def set_aside_checkpoints(folder: Path) -> None:
    """Rename a run's checkpoint folder to the first free `<folder>.old-<n>`, if there is anything in it. Collective."""
    dist.barrier()
    if dist.get_rank() == 0 and folder.is_dir() and any(folder.iterdir()):
        number = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}.old-{n}").exists())
        folder.rename(folder.with_name(f"{folder.name}.old-{number}"))
    dist.barrier()


def save_checkpoint(
    folder: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: MegatronOptimizer,
    mesh: ModelMesh,
    counters: dict[str, Any],
) -> Path:
    """Write `<folder>/step-<step>` and return its path. Collective over the mesh's ranks.

    It is written under another name and renamed by rank 0 when every rank has finished.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f"{final.name}.partial"
    if dist.get_rank() == mesh.ranks[0]:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    state = _sharded_state(model, optimizer, mesh, is_loading=False)
    state["counters"] = counters
    dist_checkpointing.save(state, str(partial))
    dist.barrier()
    if dist.get_rank() == mesh.ranks[0]:
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
    dist.barrier()
    return final


def load_checkpoint(
    path: Path, model: torch.nn.Module, optimizer: MegatronOptimizer | None, mesh: ModelMesh
) -> dict[str, Any]:
    """Fill the model, and the optimizer where one is given, from a checkpoint of any layout. Collective.

    Returns:
        The counters saved with it.

    Raises:
        UserError: it does not fit, is damaged, or holds what may run code when loaded.
    """
    # megatron-core unpickles what it finds. Every rank looks for itself, and all come to the same.
    check_pickles(path)
    if optimizer is not None:
        create_optimizer_state(optimizer)
    state = _sharded_state(model, optimizer, mesh, is_loading=True)
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
    return dict(loaded["counters"])


def _sharded_state(
    model: torch.nn.Module, optimizer: MegatronOptimizer | None, mesh: ModelMesh, is_loading: bool
) -> dict[str, Any]:
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
