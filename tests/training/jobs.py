"""Jobs under the launcher, in processes of their own, to be killed, signalled and started again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from megakd.config.load import config_from_dict, dump_config
from megakd.launch.nodes import ALONE, Nodes
from megakd.launch.processes import END_SIGNAL, rank_processes

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = (
    "import json, sys; from megakd.launch.launcher import launch_ranks; from megakd.launch.nodes import Nodes; "
    "sys.exit(launch_ranks([sys.argv[1], 'train', sys.argv[2]], int(sys.argv[3]), sys.argv[4], int(sys.argv[5]), "
    "saves=True, nodes=Nodes(**json.loads(sys.argv[6])), teacher_ranks=int(sys.argv[7])))"
)
TIMEOUT_SECONDS = 240.0


class Job:
    """A training job of `ranks` ranks, or a node of one with so many; what it prints is in `log`.

    `prefix` is what the command begins with; it must become the command, as `ip netns exec` does.
    """

    def __init__(self, values: dict[str, Any], ranks: int, *, max_restarts: int = 0,
                 worker: str = "megakd.launch.worker", nodes: Nodes = ALONE,
                 prefix: Sequence[str] = ()) -> None:  # fmt: skip
        self.folder = Path(values["run"]["output_dir"])
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ranks = ranks
        config = self.folder / nodes.file("job.yaml")
        config.write_text(dump_config(config_from_dict(values)))
        self._log = self.folder / nodes.file("job.log")
        self._start = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-c", LAUNCH, worker, str(config), str(ranks), str(self.folder / "logs"),
                 str(max_restarts), json.dumps(asdict(nodes)), str(values["teacher"].get("ranks", 0))],
                cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    @property
    def log(self) -> str:
        """What this job has printed."""
        with self._log.open("rb") as file:
            file.seek(self._start)
            return file.read().decode(errors="replace")

    def agent(self) -> psutil.Process:
        """torchrun's process."""
        self.wait_for(lambda: psutil.Process(self.process.pid).children())
        return psutil.Process(self.process.pid).children()[0]

    def rank_pids(self) -> list[int]:
        """The ranks', in their order, once all are there."""
        self.wait_for(lambda: len(rank_processes(self.agent().pid)) == self.ranks)
        return sorted(process.pid for process in rank_processes(self.agent().pid))

    def wait_for(self, condition: Any) -> None:
        """Wait until it holds; the job must live."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not condition():
            assert self.process.poll() is None, self.log[-5000:]
            assert time.monotonic() < deadline, self.log[-5000:]
            time.sleep(0.005)

    def wait_for_step(self, step: int) -> None:
        """Wait until metrics.jsonl has it; the checkpoint of a step before may still be written."""
        path = self.folder / "metrics.jsonl"
        self.wait_for(lambda: path.exists() and path.read_bytes().count(b"\n") >= step)

    def wait_for_checkpoint(self, step: int) -> None:
        """Wait until it is in its place."""
        self.wait_for((self.folder / "checkpoints" / f"step-{step:08d}").is_dir)

    def press_ctrl_c_twice(self) -> None:
        """Send SIGINT, and again when the launcher has heard it; torchrun is frozen, so that the job lives by then."""
        agent = self.agent()
        agent.suspend()
        self.process.send_signal(signal.SIGINT)
        self.wait_for(lambda: _is_pending(agent, END_SIGNAL))
        self.process.send_signal(signal.SIGINT)

    def end(self, seconds: float = TIMEOUT_SECONDS) -> int:
        """Wait for the job's status."""
        return self.process.wait(seconds)

    def kill(self) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            for process in [*psutil.Process(self.process.pid).children(recursive=True)]:
                process.kill()
            self.process.kill()
            self.process.wait()


def _is_pending(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether a frozen process will receive a signal when it is continued."""
    found = re.search(r"^ShdPnd:\s*(\w+)$", Path(f"/proc/{process.pid}/status").read_text(), flags=re.MULTILINE)
    assert found is not None
    return bool(int(found[1], 16) >> (number - 1) & 1)


def is_saving(log: str) -> bool:
    """Whether the last save that a log tells of had not ended."""
    found = re.findall(r"^(saving the checkpoint of step|checkpoint /|resumed from)", log, flags=re.MULTILINE)
    return bool(found) and found[-1].startswith("saving")
