"""The launcher's worker, one rank of which stops for good in the middle of a run."""

from __future__ import annotations

import os
import signal
import time
from typing import Any


def main(args: list[str]) -> Any:
    """As megakd.launch.worker's; HANG says which rank stops after six steps, and how: sleep, or SIGSTOP."""
    from megakd.data.batches import TrainBatches
    from megakd.launch import worker

    microbatches = TrainBatches.microbatches
    rank, how = os.environ["HANG"].split()

    def never_again(self: TrainBatches, step: int) -> list[Any]:
        if step == 6 and os.environ["RANK"] == rank:
            if how == "sleep":
                time.sleep(3600)
            os.kill(os.getpid(), signal.SIGSTOP)
        return microbatches(self, step)

    TrainBatches.microbatches = never_again  # type: ignore[method-assign]
    return worker.main(args)
