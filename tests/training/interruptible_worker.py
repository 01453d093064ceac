"""The launcher's worker, with saves that take long enough to be killed in."""

from __future__ import annotations

import os
import random
import time
from typing import Any


def main(args: list[str]) -> str | None:
    """As megakd.launch.worker's; each rank writes its part of a checkpoint slowly, beginning and end."""
    from megakd.checkpoint import writer
    from megakd.launch import worker

    write, complete = writer._write, writer._complete
    delay = random.Random(os.getpid())

    def slowly(*arguments: Any) -> Any:
        time.sleep(delay.uniform(0, 0.2))
        written = write(*arguments)
        time.sleep(delay.uniform(0, 0.2))
        return written

    def slowly_complete(*arguments: Any) -> None:
        time.sleep(delay.uniform(0, 0.1))
        complete(*arguments)
        time.sleep(delay.uniform(0, 0.1))

    writer._write, writer._complete = slowly, slowly_complete
    return worker.main(args)
