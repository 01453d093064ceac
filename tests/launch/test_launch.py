"""launch_ranks with real torchrun and small workers: statuses, last lines, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = (
    "import sys; from megakd.launch.launcher import launch_ranks; "
    "sys.exit(launch_ranks(sys.argv[3:], 2, sys.argv[1], int(sys.argv[2])))"
)
TIMEOUT_SECONDS = 120


def start(
    behaviour: str, folder: Path, max_restarts: int = 0, launch: str = LAUNCH, **environment: str
) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", launch, str(folder / "logs"), str(max_restarts)]
    inherited = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        [*command, "tests.launch.workers_for_launch", behaviour, str(folder)],
        cwd=ROOT,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_to_end(behaviour: str, folder: Path, max_restarts: int = 0, **environment: str) -> tuple[int, str]:
    process = start(behaviour, folder, max_restarts, **environment)
    _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    return process.returncode, errors


def wait_for_pids(process: subprocess.Popen[str], folder: Path) -> set[int]:
    """Pids of torchrun's process, of both ranks and of their children, once all are there."""
    files = [folder / "pids-0", folder / "pids-1"]
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not all(file.exists() for file in files):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return {int(pid) for file in files for pid in file.read_text().split()}


def wait_until_gone(pids: set[int]) -> None:
    """Fail unless every process ends by itself soon; a zombie that nobody reaps in a container counts as ended."""
    deadline = time.monotonic() + 20
    alive = pids
    while alive:
        alive = {pid for pid in alive if psutil.pid_exists(pid) and not _is_zombie(pid)}
        assert time.monotonic() < deadline, f"left behind: {alive}"
        time.sleep(0.01)


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_success_shares_the_cores_and_returns_zero(tmp_path: Path) -> None:
    status, errors = run_to_end("succeed", tmp_path)
    assert status == 0
    assert errors == ""
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == [f"2 {threads}"] * 2


@pytest.mark.parametrize(("max_restarts", "found"), [(0, "held"), (1, "ECONNREFUSED")])
def test_nobody_can_take_the_port_of_ranks_that_start_once(tmp_path: Path, max_restarts: int, found: str) -> None:
    assert run_to_end("look_at_the_port", tmp_path, max_restarts) == (0, "")
    assert [(tmp_path / f"port-{rank}").read_text() for rank in (0, 1)] == [found] * 2


def test_the_users_thread_count_is_kept(tmp_path: Path) -> None:
    assert run_to_end("succeed", tmp_path, OMP_NUM_THREADS="5")[0] == 0
    assert (tmp_path / "rank-0").read_text() == "2 5"


def test_user_error_is_one_line_status_two_and_no_restart(tmp_path: Path) -> None:
    status, errors = run_to_end("bad_input", tmp_path, max_restarts=2)
    assert status == 2
    assert errors.splitlines()[-1] == (
        "error: data.train is 'nowhere'; no such file. Give the path of a .bin/.idx pair."
    )
    assert {path.name for path in tmp_path.glob("attempt-*")} <= {"attempt-0", "attempt-1"}


def test_user_error_without_restarts_prints_nothing_else(tmp_path: Path) -> None:
    status, errors = run_to_end("bad_input", tmp_path)
    assert status == 2
    assert errors == "error: data.train is 'nowhere'; no such file. Give the path of a .bin/.idx pair.\n"


def test_a_rank_that_is_only_starting_ends_without_a_word(tmp_path: Path) -> None:
    """Python cannot be told before it has started that SIGINT is to end it, and would say where it was."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\nif os.environ.get('RANK') == '0':\n    time.sleep(60)\n"
    )
    status, errors = run_to_end("bad_input", tmp_path, PYTHONPATH=str(tmp_path))
    assert status == 2
    assert errors == "error: data.train is 'nowhere'; no such file. Give the path of a .bin/.idx pair.\n"


def test_the_first_exception_is_named_last(tmp_path: Path) -> None:
    status, errors = run_to_end("first_of_two_errors", tmp_path)
    assert status == 1
    assert errors.splitlines()[-1] == "error: rank 1: RuntimeError: the cause"
    assert "with a second line" in errors
    assert "Connection closed" not in errors
    assert f"{tmp_path / 'logs' / 'torchrun.log'}" in errors


def test_a_killed_rank_is_named_with_its_signal(tmp_path: Path) -> None:
    status, errors = run_to_end("killed", tmp_path)
    assert status == 1
    assert errors.splitlines()[-1].startswith("error: rank 1 was killed by SIGKILL")
    assert "Connection closed" not in errors


def test_an_exit_without_a_message_is_named_with_its_status(tmp_path: Path) -> None:
    """Whoever starts the launcher may ignore SIGCHLD, with which the kernel keeps no statuses."""
    ignoring = f"import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); {LAUNCH}"
    process = start("unequal_exit", tmp_path, launch=ignoring)
    _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 1
    assert errors.splitlines()[-1] == "error: rank 0 ended with status 7 and no message"


@pytest.mark.parametrize(
    ("behaviour", "line"),
    [
        ("leave_with_0", "error: rank 1 ended with status 0 before its work was done"),
        ("say_0_and_exit", "error: rank 1: SystemExit: 0, before its work was done"),
    ],
)
def test_a_rank_that_leaves_with_status_0_has_not_finished(tmp_path: Path, behaviour: str, line: str) -> None:
    status, errors = run_to_end(behaviour, tmp_path)
    assert (status, errors.splitlines()[-1]) == (1, line)


def test_a_rank_that_is_only_starting_hears_torchrun(tmp_path: Path) -> None:
    """What ends the others when one has failed must not be lost on a rank: torchrun would wait half a minute for it."""
    log = tmp_path / "logs" / "torchrun.log"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib, time\nif os.environ.get('RANK') == '1':\n"
        f"    while 'closing signal SIGTERM' not in pathlib.Path({str(log)!r}).read_text():\n        time.sleep(0.01)\n"
    )
    status, errors = run_to_end("unequal_exit", tmp_path, PYTHONPATH=str(tmp_path))
    assert (status, errors.splitlines()[-1]) == (1, "error: rank 0 ended with status 7 and no message")
    assert "Unable to shutdown" not in log.read_text()


def test_a_restart_can_succeed_and_shows_why_it_was_needed(tmp_path: Path) -> None:
    status, errors = run_to_end("fail_once", tmp_path, max_restarts=1)
    assert status == 0
    assert "RuntimeError: only the first time" in errors
    assert (tmp_path / "rank-0").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_all_ranks_with_one_line(tmp_path: Path, number: signal.Signals, status: int) -> None:
    process = start("wait_for_the_end", tmp_path)
    pids = wait_for_pids(process, tmp_path)
    process.send_signal(number)
    _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == status
    assert errors == f"stopped by {number.name}; all ranks have ended\n"
    wait_until_gone(pids)


def test_a_second_signal_kills_ranks_that_do_not_listen(tmp_path: Path) -> None:
    process = start("deaf", tmp_path)
    pids = wait_for_pids(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode in (130, 143)
    assert len(errors.splitlines()) == 1
    wait_until_gone(pids)


def test_killing_torchrun_leaves_nothing(tmp_path: Path) -> None:
    process = start("wait_for_the_end", tmp_path)
    pids = wait_for_pids(process, tmp_path)
    agent_pid = int((tmp_path / "pids-0").read_text().split()[0])
    os.kill(agent_pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 1
    assert errors.splitlines()[-1] == "error: torchrun was killed by SIGKILL; all ranks were ended"
    wait_until_gone(pids)


def test_killing_the_launcher_leaves_nothing(tmp_path: Path) -> None:
    process = start("wait_for_the_end", tmp_path)
    pids = wait_for_pids(process, tmp_path)
    process.kill()
    process.communicate(timeout=TIMEOUT_SECONDS)
    wait_until_gone(pids)


def test_a_signal_while_torchruns_process_ends_prints_nothing(tmp_path: Path) -> None:
    """The launcher tells it to end where a rank met bad input, and it may be ending already."""
    signalled_at_exit = (
        "import json, os, signal, sys, time, weakref\n"
        "from megakd.launch.agent import main\n"
        "last = weakref.finalize(main, lambda: (os.kill(os.getpid(), signal.SIGHUP), time.sleep(0.1)))\n"
        "options = dict(launcher_pid=os.getppid(), log_dir=sys.argv[1], scratch_dir=sys.argv[1], nproc_per_node=1,\n"
        "               max_restarts=0, nodes={})\n"
        "sys.exit(main([json.dumps(options), *sys.argv[2:]]))\n"
    )
    command = [sys.executable, "-c", signalled_at_exit, str(tmp_path)]
    ended = subprocess.run(
        [*command, "tests.launch.workers_for_launch", "succeed", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=TIMEOUT_SECONDS,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_full_disk_does_not_hide_the_failure(tmp_path: Path, small_disk: Callable[[str], Path]) -> None:
    small_disk("64k")
    with pytest.raises(OSError, match="No space left"), (tmp_path / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    status, errors = run_to_end("bad_input", tmp_path, max_restarts=2)
    assert status == 2
    assert errors.splitlines()[-1].startswith("error: data.train is 'nowhere'; no such file.")
