"""The launcher's worker, with steps and saves that take long enough to be killed in."""

from __future__ import annotations

import os
import random
import time
from typing import Any

STEP_SECONDS = 0.05


def main(args: list[str]) -> Any:
    """As megakd.launch.worker's; steps take their time, and so do the beginning and the end of each part of a save."""
    from megakd.checkpoint import writer
    from megakd.launch import worker
    from megakd.training import run

    write, complete, train_step = writer._write, writer._complete, run.train_step
    delay = random.Random(os.getpid())

    def slowly(*arguments: Any) -> Any:
        time.sleep(delay.uniform(0, 0.1))
        written = write(*arguments)
        time.sleep(delay.uniform(0, 0.1))
        return written

    def slowly_complete(*arguments: Any) -> None:
        time.sleep(delay.uniform(0, 0.05))
        complete(*arguments)
        time.sleep(delay.uniform(0, 0.05))

    def slow_step(*arguments: Any) -> Any:
        time.sleep(STEP_SECONDS)
        return train_step(*arguments)

    writer._write, writer._complete, run.train_step = slowly, slowly_complete, slow_step
    return worker.main(args)
