"""Places beside the run's own files where its figures are shown: TensorBoard, Weights & Biases.

Neither may cost the run anything: what goes wrong in one is said once, and the run goes on without it.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megakd.common.logging import log
from megakd.config.schema import Config, WandbSection

WANDB_RECORD = "wandb.json"
_SECONDS_TO_FINISH = 60.0
Figures = Mapping[str, int | float]


class Board(Protocol):
    """Takes figures by step."""

    def add(self, step: int, figures: Figures) -> None:
        """Show figures of a step; steps come in order, a step's figures in several calls or one."""
        ...

    def close(self) -> None:
        """Show what has not been shown yet, and no more."""
        ...


class TensorBoard:
    """Events in <folder>/tensorboard; those of steps after `step`, of a run cut short, are hidden."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def add(self, step: int, figures: Figures) -> None:
        """See Board.add."""
        if self._writer is None:
            return
        try:
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)
        except OSError as error:
            self._stop(error)

    def close(self) -> None:
        """See Board.close."""
        if self._writer is None:
            return
        try:
            self._writer.close()
        except OSError as error:
            self._stop(error)

    def _stop(self, error: OSError) -> None:
        self._writer = None
        log.warning(f"TensorBoard's events cannot be written ({error.strerror}); there are no more of them")


class WeightsAndBiases:
    """The run on Weights & Biases, under an id that <folder>/wandb.json keeps, so that a resumed run goes on there.

    Steps that are trained again after resuming are not shown twice: Weights & Biases keeps the first figures of a step,
    and resumed steps repeat them where neither settings nor layout have changed.

    Args:
        settings: the run's whole configuration, shown beside the figures.
        step: steps already done; at 0 a run begins anew, under a new id.
    """

    def __init__(self, folder: Path, section: WandbSection, name: str, settings: Mapping[str, Any], step: int) -> None:
        self._run: Any = None
        try:
            run_id = _run_id(folder / WANDB_RECORD, section, step)
            import wandb

            self._run = wandb.init(
                project=section.project, entity=section.entity, group=section.group, tags=section.tags, name=name,
                id=run_id, resume="allow", mode=section.mode, dir=str(folder), config=dict(settings),
                # The run's own log is its record; a question for a key that nobody answers must not keep it waiting.
                settings=wandb.Settings(console="off", silent=True, login_timeout=30),
            )  # fmt: skip
        except Exception as error:  # a network, an account or a disk that fails must not end a run
            self._stop(error)
            return
        place = (
            self._run.url if section.mode == "online" else f"offline; `wandb sync {folder}/wandb/*-{run_id}` sends it"
        )
        log.info(f"Weights & Biases: run {run_id} of project {section.project} ({place})")

    def add(self, step: int, figures: Figures) -> None:
        """See Board.add."""
        if self._run is None:
            return
        try:
            self._run.log(dict(figures), step=step)
        except Exception as error:
            self._stop(error)

    def close(self) -> None:
        """See Board.close; waits for the network for a minute at most."""
        run, self._run = self._run, None
        if run is None:
            return
        problems: list[Exception] = []

        def finish() -> None:
            try:
                run.finish()
            except Exception as error:
                problems.append(error)

        thread = threading.Thread(target=finish, name="megakd-wandb", daemon=True)
        thread.start()
        thread.join(_SECONDS_TO_FINISH)
        if thread.is_alive():
            problems.append(TimeoutError(f"not finished after {_SECONDS_TO_FINISH:.0f} s"))
        if problems:
            self._stop(problems[0])

    def _stop(self, error: Exception) -> None:
        self._run = None
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        log.warning(f"Weights & Biases gets no more figures ({reason}); the run's own files have all of them")


def open_boards(config: Config, folder: Path, step: int) -> list[Board]:
    """The boards that a configuration asks for, for a run that has done `step` steps."""
    boards: list[Board] = []
    if config.logging.tensorboard:
        boards.append(TensorBoard(folder, step))
    if config.logging.wandb is not None:
        settings = config.model_dump(mode="json")
        boards.append(WeightsAndBiases(folder, config.logging.wandb, config.run.name, settings, step))
    return boards


def _run_id(record: Path, section: WandbSection, step: int) -> str:
    """The id that the run has had in this project, or a new one, which is written down."""
    place = {"project": section.project, "entity": section.entity}
    if step and record.exists():
        known = json.loads(record.read_text())
        if {key: known.get(key) for key in place} == place:
            return str(known["id"])
    run_id = secrets.token_hex(4)
    record.write_text(json.dumps({"id": run_id, **place}) + "\n")
    return run_id
