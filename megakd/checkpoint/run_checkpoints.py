"""A run's checkpoints: written aside and then named, checked before they are read, removed when superfluous."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megakd.checkpoint.checksums import Damage, check_files
from megakd.checkpoint.folders import (
    checkpoint_steps,
    partial_folder,
    prune,
    remove_checkpoint,
    remove_remains,
    set_aside,
    step_folder,
)
from megakd.checkpoint.random_states import restore_random_states
from megakd.checkpoint.record import Record, read_record
from megakd.checkpoint.state import load_state, sharded_state
from megakd.checkpoint.writer import CheckpointWriter
from megakd.common.durable import sync_folder
from megakd.common.errors import UserError
from megakd.common.logging import log
from megakd.parallel.mesh import ModelMesh
from megakd.parallel.rank_0 import describe_os_error, on_rank_0


class RunCheckpoints:
    """The checkpoints in a folder, for one model and optimizer. Every method is collective over the world.

    Args:
        keep_last: how many of the newest stay when another is named; None keeps all.
        in_background: `save` returns when the state is copied; `finish` when it is on disk.
    """

    def __init__(
        self,
        folder: Path,
        model: torch.nn.Module,
        optimizer: MegatronOptimizer,
        mesh: ModelMesh,
        *,
        keep_last: int | None = None,
        in_background: bool = False,
    ) -> None:
        self.folder = folder
        self._model, self._optimizer, self._mesh = model, optimizer, mesh
        self._keep_last, self._in_background = keep_last, in_background
        self._writer = CheckpointWriter()
        self._step = 0
        self._kept: Sequence[Sequence[int]] = ()

    @property
    def is_saving(self) -> bool:
        """Whether a save was started and not finished; the same on every rank."""
        return self._writer.is_busy

    @property
    def is_written(self) -> bool:
        """Whether this rank has written its part of the save that goes on; `finish` need not wait for it."""
        return self._writer.is_written

    def save(self, record: Record, kept: Sequence[Sequence[int]] = (), *, waits: bool = False) -> str | None:
        """Write the state as it is now as the checkpoint of `record.step`, after an earlier save has finished.

        Args:
            kept: of each, the checkpoint of the first step that has one stays, however old.
            waits: finish at once, as without `in_background`.

        Returns:
            What went wrong on a disk, with this save or the one before it; the checkpoints named before are there.
        """
        earlier = self.finish()
        self._step, self._kept = record.step, kept
        partial = partial_folder(self.folder, record.step)
        problem = _problem_on_rank_0(lambda: _make_empty(partial))
        if problem is not None:
            return problem
        waits = waits or not self._in_background
        state = sharded_state(self._model, self._optimizer, self._mesh, is_loading=False)
        self._writer.start(partial, state, record, waits=waits)
        return (self.finish() if waits else None) or earlier

    def finish(self) -> str | None:
        """Wait for the save that goes on, if any, and give it its name. Returns what went wrong on a disk."""
        if not self._writer.is_busy:
            return None
        problem = self._writer.finish()
        if problem is None:
            problem = _problem_on_rank_0(self._name)
        if problem is not None:
            # What was written of it takes room that the disk may lack.
            _problem_on_rank_0(lambda: remove_remains(self.folder))
        else:
            log.info(f"checkpoint {step_folder(self.folder, self._step)}")
        return problem

    def newest(self) -> tuple[Path, Record] | None:
        """The newest checkpoint whose files are all as they were written; None where there is none at all.

        Every rank reads a share of the files. Damaged ones are named in a warning.

        Raises:
            UserError: all are damaged, or it is of another version.
        """
        # As rank 0 sees them: a shared file system may show others an older list.
        found: list[list[Path]] = [list(checkpoint_steps(self.folder).values())]
        dist.broadcast_object_list(found, src=0)
        for path in reversed(found[0]):
            damage = _first_damage(path)
            if damage is None:
                return path, read_record(path)
            log.warning(f"{path} is damaged ({damage}); the checkpoint before it is used")
        if found[0]:
            raise UserError(
                f"{self.folder} holds checkpoints and all of them are damaged, see above. Copy them again, set "
                "checkpoint.resume=false to start over, or give another run.output_dir."
            )
        return None

    def load(self, path: Path, record: Record, layout: str) -> None:
        """Fill the model and the optimizer, and the random states where the layout is the one that saved them.

        Raises:
            UserError: it does not fit the model.
        """
        load_state(path, self._model, self._optimizer, self._mesh)
        if record.layout == layout:
            restore_random_states(path)
        else:
            log.info(f"{path} was written by {record.layout}; random states begin anew on {layout}")

    def load_model(self, path: Path) -> None:
        """Fill the model alone.

        Raises:
            UserError: it does not fit the model.
        """
        load_state(path, self._model, None, self._mesh)

    def tidy(self, newest: Path | None) -> None:
        """Before a run goes on from `newest`: set damaged ones after it aside and remove what a killed run left."""

        def tidy() -> None:
            remove_remains(self.folder)
            for path in checkpoint_steps(self.folder).values():
                if newest is not None and path.name > newest.name:
                    log.warning(f"{path} is now {set_aside(path, 'damaged').name}")

        problem = _problem_on_rank_0(tidy)
        if problem is not None:
            raise UserError(f"{self.folder} cannot be written to ({problem}). Give another run.output_dir.")

    def set_aside(self) -> None:
        """Rename the folder to the first free `<folder>.old-<n>`, if there is anything in it."""

        def rename() -> None:
            if self.folder.is_dir() and any(self.folder.iterdir()):
                log.info(f"earlier checkpoints are in {set_aside(self.folder, 'old')} now")

        problem = _problem_on_rank_0(rename)
        if problem is not None:
            raise UserError(f"{self.folder} cannot be renamed ({problem}). Give another run.output_dir.")

    def _name(self) -> None:
        """Give what is complete its name, then remove what it makes superfluous."""
        final = step_folder(self.folder, self._step)
        if final.exists():
            remove_checkpoint(final)
        partial_folder(self.folder, self._step).rename(final)
        sync_folder(self.folder)
        prune(self.folder, self._keep_last, self._kept)


def _problem_on_rank_0(action: Callable[[], object]) -> str | None:
    """Run `action` on rank 0; what went wrong on its disk, if anything, on every rank. Collective."""

    def run() -> None:
        action()

    try:
        on_rank_0(run)
    except OSError as error:
        return describe_os_error(error)
    return None


def _make_empty(partial: Path) -> None:
    remove_remains(partial.parent)
    partial.mkdir(parents=True)


def _first_damage(path: Path) -> str | None:
    """The first damage that a rank finds in its share of a checkpoint's files. Collective."""
    mine: str | None = None
    try:
        check_files(path, dist.get_rank(), dist.get_world_size())
    except Damage as damage:
        mine = str(damage)
    everywhere: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    return next((damage for damage in everywhere if damage is not None), None)
