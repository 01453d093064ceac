"""Workers the launcher's tests run instead of training; none imports torch."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from megakd.common.errors import UserError


def main(args: list[str]) -> None:
    """Run `args` = (name of a behaviour, folder for what the test looks at)."""
    behaviour, folder = args[0], Path(args[1])
    rank = int(os.environ["RANK"])
    BEHAVIOURS[behaviour](rank, folder)


def succeed(rank: int, folder: Path) -> None:
    (folder / f"rank-{rank}").write_text(f"{os.environ['WORLD_SIZE']} {os.environ['OMP_NUM_THREADS']}")


def bad_input(rank: int, folder: Path) -> None:
    (folder / f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}").touch()
    if rank == 1:
        raise UserError("data.train is 'nowhere'; no such file. Give the path of a .bin/.idx pair.")
    time.sleep(600)  # writes nothing, since there may be no room


def first_of_two_errors(rank: int, folder: Path) -> None:
    if rank == 1:
        (folder / "failed").touch()
        raise RuntimeError("the cause\nwith a second line")
    while not (folder / "failed").exists():
        time.sleep(0.001)
    # Give rank 1 the time to have failed, then fail like a peer whose connection closed.
    while not (folder / "logs" / "rank-1.error").exists():
        time.sleep(0.001)
    raise RuntimeError("Connection closed by peer")


def killed(rank: int, folder: Path) -> None:
    lock = (folder / "rank-1-lives").open("w")
    if rank == 1:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "locked").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    while not (folder / "locked").exists():
        time.sleep(0.001)
    # The kernel gives the lock away when rank 1 has died: only then can its peer see a closed connection.
    fcntl.flock(lock, fcntl.LOCK_EX)
    raise RuntimeError("Connection closed by peer")


def unequal_exit(rank: int, folder: Path) -> None:
    if rank == 0:
        os._exit(7)
    wait_for_the_end(rank, folder)


def leave_with_0(rank: int, folder: Path) -> None:
    if rank == 1:
        os._exit(0)
    succeed(rank, folder)


def say_0_and_exit(rank: int, folder: Path) -> None:
    if rank == 1:
        sys.exit(0)
    wait_for_the_end(rank, folder)


def fail_once(rank: int, folder: Path) -> None:
    if rank == 0 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise RuntimeError("only the first time")
    succeed(rank, folder)


def look_at_the_port(rank: int, folder: Path) -> None:
    """Whether the port on which the ranks will meet is held before any of them has opened it."""
    with socket.socket() as client:
        status = client.connect_ex((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
    (folder / f"port-{rank}").write_text("held" if status == 0 else errno.errorcode[status])


def wait_for_the_end(rank: int, folder: Path) -> None:
    """Be there, with a grandchild in a session of its own, until something ends this process."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    partial = folder / f"partial-{rank}"
    partial.write_text(f"{os.getppid()} {os.getpid()} {child.pid}")
    partial.rename(folder / f"pids-{rank}")
    time.sleep(600)


def deaf(rank: int, folder: Path) -> None:
    """Like `wait_for_the_end`, and SIGTERM does nothing."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wait_for_the_end(rank, folder)


BEHAVIOURS = {
    f.__name__: f
    for f in (
        succeed,
        bad_input,
        first_of_two_errors,
        killed,
        unequal_exit,
        leave_with_0,
        say_0_and_exit,
        fail_once,
        look_at_the_port,
        wait_for_the_end,
        deaf,
    )
}
