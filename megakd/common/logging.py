"""One logger for the project; only rank 0 speaks below the level of an error: what others would say it says too."""

from __future__ import annotations

import logging
import sys

log = logging.getLogger("megakd")


class _StandardOutput(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what sys.stdout is at the time: a progress bar puts itself in its place while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)


def configure_logging(rank: int = 0) -> None:
    """Send the project's log to standard output, bare lines on rank 0, errors with the rank elsewhere."""
    handler = _StandardOutput()
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    log.propagate = False
