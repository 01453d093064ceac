"""What a run exits with that was ended before its time: never 0, whatever ended it and whoever reaped its processes.

The runs are `train` as a user types it, in this process, whose torchrun is frozen as soon as it is there: what ends it
then is certain to be the launcher's SIGKILL.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from megakd.cli.main import main
from megakd.common.watchdog import Hang, hang_file
from megakd.launch import launcher
from megakd.launch.failures import RankError, save_rank_error
from megakd.launch.launcher import launch_ranks
from megakd.launch.nodes import Nodes
from tests.training.runs import run_values, write_run_files

AGENT = "megakd.launch.agent"
TIMEOUT_SECONDS = 60.0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def config(files: Path, tmp_path: Path) -> Path:
    """A run of one rank that saves, in `run` beside this file."""
    values = run_values(files, run__output_dir=str(tmp_path / "run"), checkpoint__save_interval=1)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@dataclass
class Frozen:
    """A job whose torchrun is frozen when it has started; `act` runs beside the launcher then."""

    received: list[int] = field(default_factory=list)
    is_over: bool = False

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        """Return what the condition gives once it holds; the job must not have ended."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not (found := condition()):
            assert not self.is_over and time.monotonic() < deadline
            time.sleep(0.005)
        return found

    def send(self, *numbers: signal.Signals) -> None:
        """Send signals to the launcher, each when it has heard the one before."""
        for number in numbers:
            before = len(self.received)
            os.kill(os.getpid(), number)
            self.wait_for(lambda before=before: len(self.received) > before)


def agent_of_this_process() -> psutil.Process | None:
    return next((child for child in psutil.Process().children() if is_agent(child)), None)


def is_agent(process: psutil.Process) -> bool:
    try:
        return AGENT in process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """`frozen(run, act)`: the status of `run()`, while `act(job)` is called once torchrun is there, and frozen."""
    job, recorded = Frozen(), launcher._recorded_signals

    @contextmanager
    def watched() -> Iterator[list[int]]:
        with recorded() as received:
            job.received = received
            yield received

    monkeypatch.setattr(launcher, "_recorded_signals", watched)
    monkeypatch.setattr(launcher, "_POLL_SECONDS", 0.02)
    threads: list[threading.Thread] = []
    problems: list[BaseException] = []

    def frozen(run: Callable[[], int], act: Callable[[Frozen], None]) -> int:
        def freeze_and_act() -> None:
            try:
                job.wait_for(agent_of_this_process).suspend()
                act(job)
            except BaseException as problem:
                problems.append(problem)
                if (agent := agent_of_this_process()) is not None:
                    agent.kill()

        threads.append(threading.Thread(target=freeze_and_act))
        threads[-1].start()
        try:
            return run()
        finally:
            job.is_over = True

    yield frozen
    for thread in threads:
        thread.join()
    assert problems == []


SEQUENCES = [
    ("SIGINT SIGINT", 130), ("SIGHUP SIGHUP", 129), ("SIGINT SIGTERM", 130), ("SIGTERM SIGINT", 143),
    ("SIGUSR1 SIGHUP", 138), ("SIGTERM SIGTERM SIGTERM", 143), ("SIGUSR1 SIGTERM SIGTERM", 138),
]  # fmt: skip


@pytest.mark.parametrize(("names", "status"), SEQUENCES)
def test_signals_that_kill_a_run_are_not_taken_for_its_end(
    config: Path, frozen: Callable[..., int], capfd: pytest.CaptureFixture[str], names: str, status: int
) -> None:
    numbers = [signal.Signals[name] for name in names.split()]
    assert frozen(lambda: main(["train", str(config)]), lambda job: job.send(*numbers)) == status
    output, errors = capfd.readouterr()
    assert "how it went" not in output
    assert errors == (
        f"stopped by {', then '.join(names.split())}; the ranks were killed; there is no checkpoint, and the same "
        "command starts over\n"
    )


def test_a_second_signal_that_asks_to_save_leaves_the_time_for_it(
    config: Path, frozen: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher goes on to tell the ranks, until something else ends it."""
    told: list[int] = []
    monkeypatch.setattr(launcher, "signal_ranks", lambda pid, number: told.append(number))
    monkeypatch.setattr(launcher, "_SAVE_AGAIN_SECONDS", 0.0)

    def act(job: Frozen) -> None:
        job.send(signal.SIGUSR1, signal.SIGTERM)
        count = len(told)
        job.wait_for(lambda: len(told) > count + 2)
        job.send(signal.SIGINT)

    assert frozen(lambda: main(["train", str(config)]), act) == 138
    assert set(told) == {signal.SIGUSR1}


def test_what_there_is_to_continue_from_is_said(
    config: Path, frozen: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    """After a signal that ends a run without saving."""

    def save_and_stop(job: Frozen) -> None:
        for step in (20, 5):
            (config.parent / "run" / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        job.send(signal.SIGINT, signal.SIGINT)

    # The folders are there only when the run has been checked, or preflight would look into them.
    assert frozen(lambda: main(["train", str(config)]), save_and_stop) == 130
    assert capfd.readouterr().err == (
        "stopped by SIGINT, then SIGINT; the ranks were killed; the same command continues from the checkpoint of "
        "step 20\n"
    )


def test_a_run_that_does_not_end_in_time_is_killed(
    config: Path, frozen: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher, "_GRACE_SECONDS", 0.0)
    assert frozen(lambda: main(["train", str(config)]), lambda job: job.send(signal.SIGINT)) == 130
    assert "how it went" not in capfd.readouterr().out


def tell_of_bad_input(log_dir: Path) -> None:
    save_rank_error([log_dir], RankError(0, time.time(), "data.train is 'nowhere'; no such file.", True, ""))


def tell_of_a_hang(log_dir: Path) -> None:
    hang_file(log_dir, 0).write_text(json.dumps(vars(Hang(0, 7, "computing", 20, 30.0, "stacks"))))


FAILURES = [
    (tell_of_bad_input, 2, "error: data.train is 'nowhere'; no such file."),
    (tell_of_a_hang, 1, "error: rank 0 made no progress for 30 s in computing of step 7; all ranks were ended"),
]


@pytest.mark.parametrize(("tell", "status", "line"), FAILURES, ids=["bad input", "hang"])
def test_a_failed_run_that_does_not_end_in_time_has_failed(
    config: Path, frozen: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    tell: Callable[[Path], None], status: int, line: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(launcher, "_GRACE_SECONDS", 0.0)
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.0)
    logs = config.parent / "run" / "logs"
    assert frozen(lambda: main(["train", str(config)]), lambda job: tell(logs)) == status
    output, errors = capfd.readouterr()
    assert "how it went" not in output
    assert errors.splitlines()[-1] == line


@pytest.fixture
def first_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """`first_of_two()`: launch node 0 of two that have met; node 1 is what a test writes for it."""
    nodes = Nodes(count=2, job="a job")
    monkeypatch.setattr(launcher, "meet", lambda *_: nodes)
    command = ["tests.launch.workers_for_launch", "succeed", str(tmp_path)]
    return lambda: launch_ranks(command, 1, tmp_path, saves=True, nodes=nodes)


def word(folder: Path, node: int) -> dict[str, Any]:
    """What a node said when it ended."""
    return dict(json.loads((folder / f"node-{node}.ended").read_text()))


def say(folder: Path, node: int, reason: str | None) -> None:
    """Have a node say that it has ended."""
    end = {"job": "a job", "host": "elsewhere", "reason": reason, "is_cause": reason is not None}
    (folder / f"node-{node}.ended").write_text(json.dumps(end))


def test_a_node_that_was_killed_does_not_say_that_it_finished(
    first_of_two: Callable[[], int], tmp_path: Path, frozen: Callable[..., int]
) -> None:
    assert frozen(first_of_two, lambda job: job.send(signal.SIGUSR1, signal.SIGINT)) == 138
    assert word(tmp_path, 0)["reason"] == "stopped by SIGUSR1, then SIGINT; the ranks were killed"
    assert word(tmp_path, 0)["is_cause"] is True


def test_a_node_that_is_ended_for_another_is_not_the_cause(
    first_of_two: Callable[[], int], tmp_path: Path, frozen: Callable[..., int], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(launcher, "_GRACE_SECONDS", 0.0)
    monkeypatch.setattr(launcher, "_GONE_SECONDS", 0.0)
    assert frozen(first_of_two, lambda job: say(tmp_path, 1, "stopped by SIGINT")) == 1
    assert (word(tmp_path, 0)["reason"], word(tmp_path, 0)["is_cause"]) == ("its ranks have ended", False)
    assert capfd.readouterr().err.splitlines()[-1] == "error: node 1 (elsewhere): stopped by SIGINT"


@pytest.mark.parametrize("failed", [False, True])
def test_a_node_that_finished_goes_by_what_the_others_say(
    first_of_two: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str], failed: bool,
) -> None:  # fmt: skip
    """Where another node was killed when this one's ranks had ended already, the job did not finish."""
    finishes = "import json, pathlib, sys; folder = json.loads(sys.argv[1])['scratch_dir']; "
    finishes += "(pathlib.Path(folder) / 'rank-0.finished').touch()"
    instead_of_torchrun(monkeypatch, finishes)
    say(tmp_path, 1, "stopped by SIGINT" if failed else None)
    assert first_of_two() == (1 if failed else 0)
    assert word(tmp_path, 0)["reason"] is None
    line = "error: node 1 (elsewhere): stopped by SIGINT"
    assert capfd.readouterr().err.splitlines()[-1:] == ([line] if failed else [])


def test_a_torchrun_that_ends_with_0_has_not_finished_where_no_rank_says_so(
    config: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whyever it does: a status that is not known reads as 0."""
    instead_of_torchrun(monkeypatch, "pass")
    assert main(["train", str(config)]) == 1
    output, errors = capfd.readouterr()
    assert "how it went" not in output
    assert errors.splitlines()[-1] == "error: torchrun ended with status 0 before all ranks had finished"


@pytest.mark.parametrize("user_error", [False, True])
def test_what_fails_when_a_signal_asked_to_save_is_told(
    config: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], user_error: bool
) -> None:
    """A save, mostly: that a signal came before is not why the run did not finish."""
    fails = (
        "import json, os, pathlib, signal, sys\n"
        "from megakd.launch.failures import RankError, save_rank_error\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "folder = pathlib.Path(json.loads(sys.argv[1])['log_dir'])\n"
        f"save_rank_error([folder], RankError(0, 1.0, 'no room for a checkpoint', {user_error}, 'traceback'))\n"
        "sys.exit(1)"
    )
    instead_of_torchrun(monkeypatch, fails)
    assert main(["train", str(config)]) == (2 if user_error else 1)
    line = "error: no room for a checkpoint" if user_error else "error: rank 0: no room for a checkpoint"
    assert capfd.readouterr().err.splitlines()[-1] == line


def instead_of_torchrun(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Have the launcher start this code, which has the agent's arguments."""
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return popen([sys.executable, "-c", code, *command[3:]] if AGENT in command else command, **options)

    monkeypatch.setattr(launcher.subprocess, "Popen", start)
