"""One logger for the project; only rank 0 speaks below the level of a warning."""

from __future__ import annotations

import logging
import sys

log = logging.getLogger("megakd")


def configure_logging(rank: int = 0) -> None:
    """Send the project's log to standard output, bare lines on rank 0, warnings with the rank elsewhere."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False
