"""Starts the ranks of a job, waits for them, and tells in one line how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from megakd.common.launch_time import LAUNCHED_AT
from megakd.common.locks import try_lock
from megakd.common.logging import log
from megakd.common.stop_request import RESUME_STATUS
from megakd.common.watchdog import GRACE_SECONDS, describe_hang, load_hangs
from megakd.config.layouts import teacher_is_dedicated, teacher_ranks, widest_tensor_parallel
from megakd.config.load import dotted_settings, dump_config
from megakd.config.schema import Config
from megakd.launch.failures import (
    AGENT_LOG,
    RankError,
    clear_records,
    first_failure,
    load_interruption,
    load_rank_errors,
    load_rank_exits,
    unfinished_ranks,
)
from megakd.launch.meeting import MeetingStopped, meet
from megakd.launch.node_watch import NodeWatch
from megakd.launch.nodes import ALONE, Nodes
from megakd.launch.processes import END_SIGNAL, adopted_orphans, signal_ranks

_RECORDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Slurm's warning and a preemption: what can save does, and ends so that the same command goes on.
_SAVING = (signal.SIGTERM, signal.SIGUSR1)
# Slurm sends SIGTERM after its warning and waits on, and so a save goes on after a second one of these.
_MOST_SAVING = 2
_SAVE_AGAIN_SECONDS = 2.0
_POLL_SECONDS = 0.2
# What befell another node ends this one's ranks too, mostly by itself.
_GONE_SECONDS = 5.0
# torchrun itself gives ranks 30 s to end after a signal.
_GRACE_SECONDS = 40.0


def run_action(
    action: str,
    config: Config,
    world_size: int,
    *,
    flags: Sequence[str] = (),
    max_restarts: int = 0,
    nodes: Nodes = ALONE,
) -> int:
    """Write the resolved configuration, run an action of `megakd.launch.worker` on this node's share of the ranks.

    The run's config.yaml is what it was trained with; other actions write theirs beside the logs. Returns the exit
    status, see `launch_ranks`.
    """
    folder = Path(config.run.output_dir)
    path = folder / "config.yaml" if action == "train" else folder / "logs" / f"{action}.yaml"
    trains = action == "train"

    def begin() -> None:
        if trains:
            held.enter_context(_held(folder))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
        partial.write_text(dump_config(config), encoding="utf-8")
        os.replace(partial, path)

    with ExitStack() as held:
        return launch_ranks(
            ["megakd.launch.worker", action, str(path), *flags],
            world_size // nodes.count,
            folder / "logs",
            max_restarts,
            saves=trains,
            hint=lambda: _resume_hint(config) if trains else "",
            nodes=nodes,
            terms={"the command": " ".join([action, *flags]), **dotted_settings(config)},
            begin=begin,
            variables=lambda met: _gpu_variables(config, met),
            teacher_ranks=teacher_ranks(config, world_size) if teacher_is_dedicated(config) else 0,
        )


def _resume_hint(config: Config) -> str:
    """Say what the same command does after a run that was ended without a save."""
    from megakd.checkpoint.folders import checkpoint_steps
    from megakd.training.run_folder import CHECKPOINTS

    if not config.checkpoint.resume:
        return "; the same command starts over (checkpoint.resume is false)"
    steps = [*checkpoint_steps(Path(config.run.output_dir) / CHECKPOINTS)]
    if not steps:
        return "; there is no checkpoint, and the same command starts over"
    return f"; the same command continues from the checkpoint of step {steps[-1]}"


def _gpu_variables(config: Config, nodes: Nodes) -> dict[str, str]:
    """What ranks on GPUs need in their environment, said on node 0; nothing on CPU."""
    import torch

    from megakd.platform import gpu_environment, lowest_compute_capability

    if not torch.cuda.is_available():
        return {}
    variables, line = gpu_environment(
        compute_capability=lowest_compute_capability(),
        tensor_model_parallel_size=widest_tensor_parallel(config),
        hang_timeout_seconds=config.safeguards.hang_timeout_seconds,
        interface=nodes.interface(),
    )
    if nodes.rank == 0:
        log.info(line)
    return variables


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Inside, no other job trains in a run's folder.

    Raises:
        UserError: one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    busy = f"run.output_dir is {folder}; another job trains there. Wait for it, or give another run.output_dir."
    lock = None
    while lock is None:
        lock = try_lock(folder / "megakd.lock", busy)
    try:
        yield
    finally:
        os.close(lock)


def launch_ranks(
    command: list[str],
    nproc_per_node: int,
    log_dir: Path | str,
    max_restarts: int = 0,
    *,
    saves: bool = False,
    hint: Callable[[], str] = lambda: "",
    nodes: Nodes = ALONE,
    terms: Mapping[str, Any] | None = None,
    begin: Callable[[], None] = lambda: None,
    variables: Callable[[Nodes], dict[str, str]] = lambda _: {},
    teacher_ranks: int = 0,
) -> int:
    """Run `command` = (module, arguments) on every rank under torchrun and return the status to exit with.

    The module's `main(args)` runs in each rank. The status is 0 where every rank has said that it came to its end, 2
    where a rank raised UserError, 1 for any other failure, 128 + n where signal n ended them, and 75 where the ranks
    ended before their time with all saved, by themselves or, with `saves`, after SIGTERM or SIGUSR1: the same command
    goes on then. The last line on standard error names the failure the others followed from, or the signals, followed
    by `hint()`. No process of the job is left when this returns, nor soon after this process is killed. Other signals
    are forwarded to the ranks; a second one kills them, but not where both ask to save. Call it from the main thread.
    `log_dir` receives torchrun's log and one file per failed rank.

    Of several nodes each calls this, with a `log_dir` that all share; one that ends or falls silent ends the others.
    Before ranks are started, `begin` is called, on node 0 alone, and all nodes must have the same `terms`: see
    `megakd.launch.meeting`. `variables` are set for the ranks; it is called when the nodes have met. Of the job's last
    `teacher_ranks` ranks it is said that they are the teacher's, where one fails.

    Raises:
        UserError: other nodes do not come, or do not fit to this one.
    """
    log_dir = Path(log_dir).resolve()
    log_dir.mkdir(parents=True, exist_ok=True)
    terms = {"--nproc-per-node": nproc_per_node, "--max-restarts": max_restarts, **(terms or {})}

    def begin_anew() -> None:
        begin()
        clear_records(log_dir)

    with tempfile.TemporaryDirectory(prefix="megakd-") as scratch_dir, _recorded_signals() as received:
        try:
            nodes = meet(nodes, terms, log_dir, begin_anew, lambda: _name(received))
        except MeetingStopped as stop:
            print(f"stopped by {stop} before the ranks were started; the same command starts them", file=sys.stderr)
            number = signal.Signals[stop.name]
            return RESUME_STATUS if saves and number in _SAVING else 128 + number
        job = _Job(log_dir, Path(scratch_dir), nproc_per_node, nodes, saves, hint, teacher_ranks)
        return _run(job, command, max_restarts, received, variables(nodes))


@dataclass(frozen=True)
class _Job:
    """This node's part of a job; see launch_ranks."""

    log_dir: Path
    scratch_dir: Path
    nproc_per_node: int
    nodes: Nodes
    saves: bool
    hint: Callable[[], str]
    teacher_ranks: int

    @property
    def world_size(self) -> int:
        """Ranks of all nodes."""
        return self.nproc_per_node * self.nodes.count

    @property
    def folders(self) -> list[Path]:
        """Where the ranks leave what is to be told: the first has room, or else the second."""
        return [self.log_dir, self.scratch_dir]


def _run(job: _Job, command: list[str], max_restarts: int, received: list[int], variables: dict[str, str]) -> int:
    """Run torchrun's process to its end and tell how it ended."""
    watch = NodeWatch(job.log_dir, job.nodes)
    options = {
        "launcher_pid": os.getpid(),
        "log_dir": str(job.log_dir),
        "scratch_dir": str(job.scratch_dir),
        "nproc_per_node": job.nproc_per_node,
        "max_restarts": max_restarts,
        "nodes": asdict(job.nodes),
    }
    with adopted_orphans():
        agent = subprocess.Popen(
            [sys.executable, "-m", "megakd.launch.agent", json.dumps(options), *command],
            env=_environment(job.nproc_per_node, job.nodes) | variables,
            start_new_session=True,
        )
        try:
            end = _wait(agent, received, job, watch)
        finally:
            # Here, since Popen takes the status of a process that another part of this one has reaped for 0.
            agent.kill()
            status = agent.wait()
    finished = status == 0 and not unfinished_ranks(job.folders, job.nodes.ranks(job.nproc_per_node))
    own_reason = None if finished else _own_reason(status, received, end, job.saves)
    watch.leave(None if finished else own_reason or "its ranks have ended", is_cause=own_reason is not None)
    if finished and not watch.others_failed():
        interruption = load_interruption(job.folders)
        if interruption is None:
            return 0  # a signal came when nothing was left to be done, if one did
        print(f"stopped by {_name(received) or interruption.reason} {interruption.outlook}", file=sys.stderr)
        return RESUME_STATUS
    if received and not _ask_only_to_save(received, job.saves):
        print(f"{own_reason or _stopped_by(received, end)}{job.hint()}", file=sys.stderr)
        return 128 + received[0]
    return _report_failure(job, status, own_reason, watch)


class _End(Enum):
    """How torchrun's process came to its end."""

    BY_ITSELF = "ended by itself"
    TOLD = "ended when it was told to"
    KILLED = "has to be killed"


def _name(received: list[int]) -> str | None:
    return signal.Signals(received[0]).name if received else None


def _stopped_by(received: list[int], end: _End) -> str:
    names = ", then ".join(signal.Signals(number).name for number in received)
    if end is _End.KILLED:
        return f"stopped by {names}; the ranks were killed"
    return f"stopped by {names}; all ranks have ended"


def _own_reason(status: int, received: list[int], end: _End, saves: bool) -> str | None:
    """What befell this node, but for its ranks."""
    if received and not _ask_only_to_save(received, saves):
        return _stopped_by(received, end)
    if status < 0 and end is _End.BY_ITSELF:
        return f"torchrun was killed by {signal.Signals(-status).name}; all ranks were ended"
    return None


def _ask_only_to_save(received: list[int], saves: bool) -> bool:
    """Whether the signals that came leave a run the time to save; what else ends it then is a failure of its own."""
    return saves and len(received) <= _MOST_SAVING and all(number in _SAVING for number in received)


def _environment(nproc_per_node: int, nodes: Nodes) -> dict[str, str]:
    """This process's environment, with threads shared out over the ranks and the same megakd importable."""
    # Gloo would otherwise take the address of the machine's own name, which often stands for its loopback.
    interface = nodes.interface()
    environment = {"GLOO_SOCKET_IFNAME": interface, **os.environ} if interface is not None else dict(os.environ)
    cores = len(os.sched_getaffinity(0))
    environment[LAUNCHED_AT] = repr(time.time())
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc_per_node)))
    source = str(Path(__file__).resolve().parents[2])
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path and path != source]
    environment["PYTHONPATH"] = os.pathsep.join([source, *paths])
    return environment


@contextmanager
def _recorded_signals() -> Iterator[list[int]]:
    """A list that receives the numbers of the signals that arrive inside."""
    received: list[int] = []
    previous = {number: signal.signal(number, lambda n, _: received.append(n)) for number in _RECORDED}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(agent: subprocess.Popen[bytes], received: list[int], job: _Job, watch: NodeWatch) -> _End:
    """Return when the agent has ended or should be killed; pass on the first signal."""
    deadline: float | None = None
    saving_since: float | None = None
    hanging_since: float | None = None
    gone_since: float | None = None
    while True:
        try:
            agent.wait(_POLL_SECONDS)
            return _End.BY_ITSELF if deadline is None else _End.TOLD
        except subprocess.TimeoutExpired:
            pass
        now = time.monotonic()
        watch.beat()
        too_many = len(received) > 1 and not _ask_only_to_save(received, job.saves)
        if too_many or (deadline is not None and now > deadline):
            return _End.KILLED
        if deadline is not None:
            continue
        hangs = load_hangs(job.log_dir)
        if hangs and hanging_since is None:
            hanging_since = now
        if gone_since is None and watch.gone() is not None:
            gone_since = now
        if received and job.saves and received[0] in _SAVING:
            # Again and again: a rank that is only starting does not listen yet.
            if saving_since is None or now - saving_since > _SAVE_AGAIN_SECONDS:
                signal_ranks(agent.pid, signal.SIGUSR1)
                saving_since = now
        elif received:
            agent.send_signal(END_SIGNAL)
            deadline = now + _GRACE_SECONDS
        if any(error.user_error for error in load_rank_errors(job.folders)):
            # Bad input stays bad: no restart can help.
            agent.send_signal(END_SIGNAL)
            deadline = now + _GRACE_SECONDS
        elif hanging_since is not None and now - hanging_since > GRACE_SECONDS / 2:
            # torchrun would wait for ranks that hear nothing.
            agent.send_signal(END_SIGNAL)
            signal_ranks(agent.pid, signal.SIGKILL)
            deadline = now + _GRACE_SECONDS
        elif gone_since is not None and now - gone_since > _GONE_SECONDS:
            # torchrun would wait for the node to come back.
            agent.send_signal(END_SIGNAL)
            deadline = now + _GRACE_SECONDS


def _report_failure(job: _Job, status: int, own_reason: str | None, watch: NodeWatch) -> int:
    """Print the failure the others followed from, its line last; return the exit status."""
    gone = watch.wait_for_the_others()
    hangs = load_hangs(job.log_dir)
    if hangs:
        print(f"stacks of the ranks: {job.log_dir}/rank-*.hang", file=sys.stderr)
        print(f"error: {describe_hang(hangs, job.world_size)}; all ranks were ended", file=sys.stderr)
        return 1
    failure = first_failure(load_rank_errors(job.folders), load_rank_exits(job.folders))
    if isinstance(failure, RankError) and failure.user_error:
        print(f"error: {failure.message}", file=sys.stderr)
        return 2
    if own_reason is not None:
        line = own_reason
    elif gone is not None and gone.is_cause:
        line = gone.line
    elif isinstance(failure, RankError):
        print(failure.traceback, file=sys.stderr)
        line = f"rank {failure.rank}: {next(iter(failure.message.strip().splitlines()))}"
    elif failure is not None:
        line = str(failure)
    elif gone is not None:
        line = gone.line
    else:
        what = "all ranks had finished" if status == 0 else "any rank failed"
        line = f"torchrun ended with status {status} before {what}"
    if failure is not None and failure.rank >= job.world_size - job.teacher_ranks:
        line = line.replace(f"rank {failure.rank}", f"rank {failure.rank} (the teacher's)", 1)
    print(f"torchrun's log: {job.log_dir / job.nodes.file(AGENT_LOG)}", file=sys.stderr)
    print(f"error: {line}", file=sys.stderr)
    return 1
