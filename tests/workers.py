"""Pools of gloo processes, one per world size and split into sides, that live for a whole test session."""

from __future__ import annotations

import atexit
import dataclasses
import gc
import importlib.util
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS_PER_CALL = 300.0
_WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class RankError(RuntimeError):
    """Something went wrong on one rank; the text holds its traceback."""


class RankPool:
    """`world_size` processes waiting for functions to run, in one gloo world or the last `teacher_ranks` in another."""

    def __init__(self, world_size: int, teacher_ranks: int = 0) -> None:
        self.directory = tempfile.mkdtemp(prefix="megakd-ranks-")
        self.connections: list[Connection] = []
        self.processes: list[Any] = []
        # A server imports torch and megatron-core once, and every rank of every pool is forked from it.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.rank_server"])
        with _environment({**_WORKER_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}):
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, rank, world_size, teacher_ranks, self.directory))
                process.start()
                theirs.close()
                self.connections.append(ours)
                self.processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], seconds: float) -> list[Any]:
        """Call `function(*args)` on every rank and return the results in rank order.

        Raises:
            BaseException: the first rank's exception, caused by a RankError that shows where it came from.
            RankError: a process died, or its exception cannot be pickled.
            TimeoutError: some ranks did not answer within `seconds`.
        """
        # sys.path grows while pytest imports test modules, so the workers get it anew with every call. Plain
        # pickle, since multiprocessing's own would hand tensors over in shared memory that the worker owns.
        call = pickle.dumps((sys.path, pickle.dumps((function, args))))
        for rank, connection in enumerate(self.connections):
            try:
                connection.send_bytes(call)
            except OSError as error:
                raise RankError(f"rank {rank} of {len(self.connections)} has died") from error
        results: dict[int, Any] = {}
        deadline = time.monotonic() + seconds
        while len(results) < len(self.connections):
            pending = [c for rank, c in enumerate(self.connections) if rank not in results]
            ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = [rank for rank in range(len(self.connections)) if rank not in results]
                raise TimeoutError(f"{function.__qualname__}: no answer from ranks {late} after {seconds:.0f} s")
            for connection in ready:
                rank = self.connections.index(connection)  # type: ignore[arg-type]
                results[rank] = self._receive(rank)
        return [results[rank] for rank in range(len(self.connections))]

    def _receive(self, rank: int) -> Any:
        try:
            succeeded, content, text = pickle.loads(self.connections[rank].recv_bytes())
        except (EOFError, OSError) as error:
            self.processes[rank].join(5)
            code = self.processes[rank].exitcode
            raise RankError(f"rank {rank} of {len(self.connections)} died with exit status {code}") from error
        if succeeded:
            return pickle.loads(content)
        cause = RankError(f"rank {rank} of {len(self.connections)}:\n{text}")
        if content is None:
            raise cause
        raise pickle.loads(content) from cause

    def close(self, patience: float = 0.0) -> None:
        """End the processes, giving them `patience` seconds to leave by themselves."""
        for connection in self.connections:
            connection.close()
        deadline = time.monotonic() + patience
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        shutil.rmtree(self.directory, ignore_errors=True)


class RankPools:
    """One RankPool per world size and its sides, started when first asked for and replaced after a failure."""

    def __init__(self) -> None:
        self.pools: dict[tuple[int, int], RankPool] = {}
        atexit.register(self.close)

    def run_ranks(
        self,
        world_size: int,
        function: Callable[..., Any],
        *args: Any,
        seconds: float = SECONDS_PER_CALL,
        teacher_ranks: int = 0,
    ) -> list[Any]:
        """Call a module-level `function(*args)` on `world_size` gloo ranks; return its results in rank order.

        With `teacher_ranks` the last so many are a world of their own; `joint` joins both.

        torch.distributed is initialised, one thread per rank. Function, arguments and results are pickled. A
        rank's exception is raised here, with that rank's traceback as its cause; the other ranks are ended then.
        """
        key = (world_size, teacher_ranks)
        if key not in self.pools:
            self.pools[key] = RankPool(*key)
        try:
            return self.pools[key].run(function, args, seconds)
        except BaseException:
            # Ranks may be left inside a collective that nobody will join.
            self.pools.pop(key).close()
            raise

    def close(self) -> None:
        """End every pool."""
        while self.pools:
            _, pool = self.pools.popitem()
            pool.close(patience=5.0)
        atexit.unregister(self.close)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables that processes started inside inherit (torch reads some while it is imported)."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# Of a rank in a pool with sides: its platform.worlds.Joint, and how often it was asked for.
_joint: Any = None
_joints = 0


def joint() -> Any:
    """What this rank shares with the other side, with keys of its own in the store for each call of this."""
    global _joints
    _joints += 1
    return dataclasses.replace(_joint, store=dist.PrefixStore(f"call {_joints}", _joint.store))


def joint_rank_is_teacher() -> bool:
    """Whether this rank is on the teacher's side."""
    return bool(_joint.is_teacher)


def _join(store: dist.Store, rank: int, world_size: int, teacher_ranks: int) -> None:
    timeout = timedelta(seconds=2 * SECONDS_PER_CALL)
    if not teacher_ranks:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        prepare_platform()
        return
    from megakd.platform import build_platform, join_sides

    global _joint
    _joint = join_sides(
        build_platform(), store, rank=rank, size=world_size, teacher_ranks=teacher_ranks, timeout=timeout
    )


def _serve(connection: Connection, rank: int, world_size: int, teacher_ranks: int, directory: str) -> None:
    """The life of one rank: join the world, then answer calls until the test session hangs up."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            store = dist.FileStore(str(Path(directory) / "store"), world_size)
            _join(store, rank, world_size, teacher_ranks)
        except BaseException as error:
            connection.recv_bytes()
            connection.send_bytes(_failure(error))
            return
        while True:
            path, call = pickle.loads(connection.recv_bytes())
            sys.path[:] = path
            try:
                function, args = pickle.loads(call)
                answer = pickle.dumps((True, pickle.dumps(function(*args)), ""))
            except BaseException as error:
                answer = _failure(error)
            _leave_groups()
            connection.send_bytes(answer)


def _leave_groups() -> None:
    """Leave every group but the world: each of gloo's has a thread that wakes a hundred times a second."""
    groups = [group for group in dist.distributed_c10d._world.pg_map if group is not dist.group.WORLD]
    for group in groups:
        dist.destroy_process_group(group)
    if groups:
        gc.collect()  # models hold groups, in circles


def prepare_platform() -> None:
    """Make megatron-core importable on CPU, where this checkout has the package that does it."""
    if importlib.util.find_spec("megakd") and importlib.util.find_spec("megakd.platform"):
        from megakd.platform import build_platform

        build_platform()


def _failure(error: BaseException) -> bytes:
    """A pickled answer that carries `error`, or only its text where it does not survive pickling."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        content = pickle.dumps(error)
        pickle.loads(content)
    except Exception:
        content = None
    return pickle.dumps((False, content, text))
