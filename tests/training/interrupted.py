"""Runs that stop at a step of a test's choosing, inside gloo workers."""

from __future__ import annotations

import io
import signal
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch.distributed as dist


@contextmanager
def stop_requested_after(step: int, rank: int = 0) -> Iterator[None]:
    """Inside, one rank hears a wish to stop when it has trained `step`; 0 is before the first."""
    from megakd.common import stop_request
    from megakd.training import run

    train_step = run.Run._train_step

    def note(self: Any, *arguments: Any) -> None:
        train_step(self, *arguments)
        if self._counters.step == step and dist.get_rank() == rank:
            stop_request._received.append(signal.SIGUSR1)

    run.Run._train_step = note  # type: ignore[method-assign]
    if step == 0 and dist.get_rank() == rank:
        stop_request._received.append(signal.SIGUSR1)
    try:
        yield
    finally:
        run.Run._train_step = train_step  # type: ignore[method-assign]
        stop_request._received.clear()


class Killed(BaseException):
    """The end of a run that had no time to save."""


@contextmanager
def killed_after(step: int) -> Iterator[None]:
    """Inside, a run ends without a word when it has trained `step`; a save in the background comes to nothing."""
    from megakd.checkpoint import run_checkpoints
    from megakd.training import run

    train_step, finish = run.Run._train_step, run_checkpoints.RunCheckpoints.finish

    def end(self: Any, *arguments: Any) -> None:
        train_step(self, *arguments)
        if self._counters.step == step:
            run_checkpoints.RunCheckpoints.finish = lambda self: None  # type: ignore[method-assign]
            raise Killed

    run.Run._train_step = end  # type: ignore[method-assign]
    try:
        yield
    except Killed:
        pass
    finally:
        run.Run._train_step = train_step  # type: ignore[method-assign]
        run_checkpoints.RunCheckpoints.finish = finish  # type: ignore[method-assign]


def run_distill(values: dict[str, Any], accept_changes: bool = False) -> str | None:
    """Train; what interrupted the run."""
    from megakd.config.load import config_from_dict
    from megakd.training.loop import distill

    interrupted = distill(config_from_dict(values), accept_changes=accept_changes).interrupted
    return interrupted.reason if interrupted is not None else None


def run_and_listen(values: dict[str, Any], accept_changes: bool = False) -> str:
    """Train; what this rank logged."""
    with redirect_stdout(io.StringIO()) as text:
        run_distill(values, accept_changes)
    return text.getvalue()


def run_until_killed(values: dict[str, Any], step: int) -> None:
    """Train until a step after which nothing more happens."""
    with killed_after(step):
        run_distill(values)


def run_until_stopped(values: dict[str, Any], step: int, rank: int) -> str | None:
    """Train until one rank is told to stop."""
    with stop_requested_after(step, rank):
        return run_distill(values)
