"""The launcher's worker, one rank of which stops for good in the middle of a run."""

from __future__ import annotations

import os
import signal
import time
from typing import Any


def main(args: list[str]) -> Any:
    """As megakd.launch.worker's; HANG says how rank 1 stops after six steps: sleep, or SIGSTOP."""
    from megakd.data.batches import TrainBatches
    from megakd.launch import worker

    microbatches, how = TrainBatches.microbatches, os.environ["HANG"]

    def never_again(self: TrainBatches, step: int) -> list[Any]:
        if step == 6 and os.environ["RANK"] == "1":
            if how == "sleep":
                time.sleep(3600)
            os.kill(os.getpid(), signal.SIGSTOP)
        return microbatches(self, step)

    TrainBatches.microbatches = never_again  # type: ignore[method-assign]
    return worker.main(args)
