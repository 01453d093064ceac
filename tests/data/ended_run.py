"""Runs of tools/preprocess_data.py in processes of their own that end where they are told to."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megakd.data import encoding, partial, preprocess, token_writer

ROOT = Path(__file__).resolve().parents[2]
OWNERS: dict[str, Any] = {"writer": token_writer.TokenWriter, "partial": partial.Partial, "os": os}


def ended_run(options: list[str], stderr: Path, *, step: str = "", how: str = "", file_size: int = -1) -> int:
    """The exit status of a run, minus the signal's number where one ended it; what it said is in `stderr`.

    `step` is "owner name n": at the call of that number the process sends itself the signal `how`. Files cannot grow
    beyond `file_size`.
    """
    # Forks of a process that has imported everything once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_run, args=(options, stderr, step, how, file_size))
    process.start()
    process.join(300)
    assert process.exitcode is not None
    return process.exitcode


def _run(options: list[str], stderr: Path, step: str, how: str, file_size: int) -> None:
    os.dup2(os.open(stderr, os.O_CREAT | os.O_WRONLY), 2)
    # A shell without job control starts what runs in the background with SIGINT ignored, and children inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    preprocess.COMMIT_SECONDS = 0
    encoding.CHUNK_RECORDS = 50
    if step:
        owner, name, count = step.split()
        setattr(OWNERS[owner], name, _ending(getattr(OWNERS[owner], name), int(count), getattr(signal, how)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, -1))
    spec = importlib.util.spec_from_file_location("preprocess_data", ROOT / "tools" / "preprocess_data.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    sys.exit(tool.main(options))


def _ending(original: Callable[..., Any], count: int, number: int) -> Callable[..., Any]:
    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count -= 1
        if count == -1:
            os.kill(os.getpid(), number)
        return original(*arguments, **named)

    return counted
