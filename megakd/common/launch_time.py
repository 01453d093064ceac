"""How long a job has been going on, and how often its ranks were started again."""

from __future__ import annotations

import os
import time

import psutil

LAUNCHED_AT = "MEGAKD_LAUNCHED_AT"
"""The launcher's variable: when the job started, in seconds since the epoch."""


def launch_age_seconds() -> float:
    """Seconds since the launcher started the job, its restarts included; since this process did without a launcher."""
    started = os.environ.get(LAUNCHED_AT)
    return time.time() - (float(started) if started else psutil.Process().create_time())


def restart_count() -> int:
    """How often torchrun has started this job's ranks again; 0 without torchrun."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
