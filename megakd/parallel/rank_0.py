"""What one rank does for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megakd.common.errors import UserError

T = TypeVar("T")


def on_rank_0(action: Callable[[], T]) -> T:
    """Do it on rank 0 and give every rank what comes of it. Collective.

    Raises:
        UserError, OSError: rank 0's, on every rank.
    """
    outcome: list[T | UserError | OSError | None] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [action()]
        except (UserError, OSError) as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], UserError | OSError):
        raise outcome[0]
    return outcome[0]  # type: ignore[return-value]


def describe_os_error(error: OSError) -> str:
    """What the system says, and of which file."""
    return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
