"""Train, or measure, what a configuration describes: one way for every teacher and layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megakd.common.errors import UserError
from megakd.common.logging import configure_logging, log
from megakd.common.stop_request import Interruption
from megakd.common.watchdog import Watchdog
from megakd.config.layouts import teacher_is_dedicated, teacher_ranks, widest_tensor_parallel
from megakd.config.schema import Config
from megakd.config.teacher_checks import check_dedicated_ranks
from megakd.evaluation import Scores
from megakd.parallel.rank_0 import on_rank_0
from megakd.platform import (
    Joint,
    Platform,
    build_platform,
    communication_timeout,
    gpu_environment,
    init_distributed,
    is_launched,
    join_sides,
    launcher_store,
)
from megakd.training.preflight import preflight
from megakd.training.run import Run
from megakd.training.run_folder import LOGS
from megakd.training.teacher_side import TeacherSide
from megakd.training.train_data import held_out_sources


@dataclass(frozen=True)
class DistillResult:
    """What a run leaves behind: its folder, the exported student, the held-out scores by step.

    On ranks that are the teacher's alone, the folder.

    Attributes:
        interrupted: what ended it before its time (a signal, the time limit) and what the same call does then; None
            where it came to its end.
    """

    folder: Path
    exported: Path | None
    scores: dict[int, Scores]
    interrupted: Interruption | None = None


def distill(config: Config, *, preflighted: bool = False, accept_changes: bool = False) -> DistillResult:
    """Train the student that `config` describes. Call it on every rank of a torchrun job, or in one process.

    Initialises torch.distributed where the caller has not. Goes on from the run folder's newest checkpoint, if any.

    Args:
        preflighted: `training.preflight` has passed already, as it has under launch.sh.
        accept_changes: go on from a checkpoint although settings that change the result are others now.

    Raises:
        UserError: the configuration or a file it names cannot be used; the message says what to change.
    """
    with _started(config, preflighted, accept_changes) as run:
        if isinstance(run, TeacherSide):
            run.serve()
            return DistillResult(Path(config.run.output_dir), None, {})
        interrupted = run.train()
        exported = run.export() if config.run.export and interrupted is None else None
    return DistillResult(run.folder, exported, run.scores, interrupted)


def evaluate_run(config: Config, *, preflighted: bool = False) -> Scores | None:
    """Measure on held-out data: the run's newest checkpoint, or the student it would start from. On every rank.

    Returns:
        The scores; None on ranks that are the teacher's alone.

    Raises:
        UserError: as `distill`, or no held-out data is named.
    """
    split = config.evaluation.split
    if held_out_sources(config, split) is None:
        raise UserError(f"evaluation needs held-out data; set data.{split} or data.{split}_fraction.")
    with _started(config, preflighted, accept_changes=True) as run:
        if isinstance(run, TeacherSide):
            run.serve()
            return None
        return run.evaluate_only()


@contextmanager
def _started(config: Config, preflighted: bool, accept_changes: bool) -> Iterator[Run | TeacherSide]:
    """The objects of this rank's side of the run, watched while they are used."""
    platform = build_platform()
    joint = _join(config, platform)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if joint is None else (joint.rank, joint.size)
    configure_logging(rank)
    if platform.is_cuda:
        missing, _ = gpu_environment(
            compute_capability=platform.compute_capability,
            tensor_model_parallel_size=widest_tensor_parallel(config),
            hang_timeout_seconds=config.safeguards.hang_timeout_seconds,
        )
        if missing:  # only without the launcher
            settings = ", ".join(f"{name}={value}" for name, value in missing.items())
            log.warning(f"not in the environment of the ranks: {settings}; it is too late to set them here")
    if not preflighted:
        # On rank 0 alone, since it reads tokenizers.
        on_rank_0(lambda: preflight(config, world_size, accept_changes=accept_changes))
    watchdog = Watchdog(Path(config.run.output_dir) / LOGS, rank, config.safeguards.hang_timeout_seconds)
    try:
        watchdog.enter("building the models")
        if joint is not None and joint.is_teacher:
            yield TeacherSide(config, platform, watchdog, joint)
        else:
            yield Run(config, platform, watchdog, joint, accept_changes=accept_changes)
    finally:
        watchdog.close()


def _join(config: Config, platform: Platform) -> Joint | None:
    """Join the world; of a teacher on ranks of its own and its student, each its own, and both the joint.

    Raises:
        UserError: there is a world already, or too few ranks.
    """
    timeout = communication_timeout(config.safeguards.hang_timeout_seconds)
    if not teacher_is_dedicated(config):
        init_distributed(platform, timeout)
        return None
    if dist.is_initialized():
        raise UserError(
            "teacher.placement is dedicated and torch.distributed is initialised; it must not be, since each side is a "
            "world of its own. Leave that to megakd, or set teacher.placement to colocated."
        )
    if not is_launched():
        raise UserError(
            "teacher.placement is dedicated and this process is all there is; the teacher needs teacher.ranks of its "
            "own beside the student's. Start it under torchrun or launch.sh, or set teacher.placement to colocated."
        )
    store, rank, size = launcher_store(timeout)
    check_dedicated_ranks(config, size)
    return join_sides(platform, store, rank=rank, size=size, teacher_ranks=teacher_ranks(config, size), timeout=timeout)
