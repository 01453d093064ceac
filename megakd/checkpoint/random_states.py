"""The ranks' random states in a checkpoint: torch's own, a GPU's, and those that megatron-core's layers draw from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megakd.common.errors import UserError

RANDOM_STATES = "random_states.safetensors"
_CPU, _GPU, _TRACKER = "cpu", "cuda", "tracker/"


def random_states() -> dict[str, Tensor]:
    """This rank's states by name, uint8 in main memory."""
    states = {_CPU: torch.get_rng_state()}
    if torch.cuda.is_available():
        states[_GPU] = torch.cuda.get_rng_state()
    tracked = get_cuda_rng_tracker().get_states()
    states |= {f"{_TRACKER}{name}": state for name, state in tracked.items() if isinstance(state, Tensor)}
    return {name: state.cpu().clone() for name, state in states.items()}


def set_random_states(states: dict[str, Tensor]) -> None:
    """Go on from states that `random_states` gave."""
    torch.set_rng_state(states[_CPU])
    if _GPU in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[_GPU])
    tracker = get_cuda_rng_tracker()
    tracked = {name.removeprefix(_TRACKER): state for name, state in states.items() if name.startswith(_TRACKER)}
    tracker.set_states({**tracker.get_states(), **tracked})


def gather_random_states() -> dict[str, Tensor]:
    """All ranks' states as `<rank>/<name>` on rank 0, nothing elsewhere. Collective."""
    everywhere: list[dict[str, Tensor]] | None = [{}] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(random_states(), everywhere, dst=0)
    return {f"{rank}/{name}": state for rank, states in enumerate(everywhere or ()) for name, state in states.items()}


def restore_random_states(folder: Path) -> None:
    """Set this rank's states to those of a checkpoint of the same layout.

    Raises:
        UserError: they cannot be read.
    """
    path = folder / RANDOM_STATES
    try:
        states = dict(_of_rank(path, dist.get_rank()))
        set_random_states(states)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read ({error}). Remove {folder} to go on from the one before.") from error


def _of_rank(path: Path, rank: int) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            if name.startswith(f"{rank}/"):
                yield name.removeprefix(f"{rank}/"), file.get_tensor(name).clone()  # not the file's own bytes
