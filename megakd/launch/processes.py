"""Ties the processes of a job together so that none outlives it. Linux only, like megatron-core's wheels."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

import psutil

RANK_MODULE = "megakd.launch.rank"
# With what torchrun is told to end, and ends its ranks. Not SIGINT: a rank that is only starting would say, in many
# lines, where Python was interrupted.
END_SIGNAL = signal.SIGHUP
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")


def die_with_parent(parent_pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process the signal as soon as its parent, `parent_pid`, is gone."""
    _prctl(_PR_SET_PDEATHSIG, number)
    # The parent may have died before the call above, which then never fires.
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), number)


@contextmanager
def adopted_orphans() -> Iterator[None]:
    """Inside, descendants whose own parent dies become children of this process; at the end all new ones are killed.

    Their statuses are lost then: end a child whose status is wanted before, through its Popen. Call it from the main
    thread.
    """
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    # Who started this process may have ignored SIGCHLD, which is inherited: the kernel keeps no status of a child then,
    # and Popen takes a status that it cannot have for 0.
    was_ignored = signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN
    if was_ignored:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        _kill_descendants(before)
        _prctl(_PR_SET_CHILD_SUBREAPER, 0)
        if was_ignored:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def rank_processes(agent_pid: int) -> list[psutil.Process]:
    """The ranks that live, children of torchrun's process."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(agent_pid).children():
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if RANK_MODULE in process.cmdline():
                    found.append(process)
    return found


def signal_ranks(agent_pid: int, number: signal.Signals) -> None:
    """Send a signal to the ranks that live."""
    for process in rank_processes(agent_pid):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _kill_descendants(spared: Collection[int]) -> None:
    """Kill every descendant but the `spared` ones and reap its children; again where one forked meanwhile."""
    for _ in range(20):
        processes = [p for p in psutil.Process().children(recursive=True) if p.pid not in spared]
        if not processes:
            return
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(processes, timeout=1)
