"""The hidden folder beside an output, in which one writer at a time prepares it."""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from megakd.common.errors import UserError
from megakd.common.locks import try_lock

LOCK_FILE = "megakd.lock"


class WorkFolder:
    """`.NAME.tmp` beside `NAME`: `new` is being written, `old` is what it replaces, and the lock file is held.

    By the lock file the folder is known as ours, by its lock whether its writer still lives. What a writer that was
    killed left is brought back or removed.

    Raises:
        UserError: another writer is at work on the same output, or the folder holds something else.
        OSError: it cannot be made.
    """

    def __init__(self, final: Path) -> None:
        self.final = final
        self.path = final.with_name(f".{final.name}.tmp")
        self.new, self.old = self.path / "new", self.path / "old"
        self._lock: int | None = None
        self._made: list[Path] = []
        try:
            while self._lock is None:
                self._make_parents()
                self._lock = self._try_to_lock()
            self.settle()
            self.new.mkdir()
        except BaseException:
            self.remove()
            raise

    def settle(self) -> None:
        """Bring back what was moved to `old` with nothing put in its place, and remove the rest.

        Raises:
            UserError: something else has taken its place since.
        """
        if os.path.lexists(self.old):
            if not os.path.lexists(self.final):
                self.old.rename(self.final)
            elif os.path.lexists(self.new):
                raise UserError(
                    f"{self.old} is an earlier {self.final.name}, moved there by a conversion that was killed; another "
                    f"{self.final.name} has its place now. Move it away, or remove it."
                )
            else:
                shutil.rmtree(self.old)
        if os.path.lexists(self.new):
            shutil.rmtree(self.new)

    def remove(self) -> None:
        """Settle, then remove the folder and the parents made for it; what cannot be is left for the next writer."""
        if self._lock is not None:
            try:
                with suppress(OSError, UserError):
                    self.settle()
                    # The mark goes last, and is closed before the folder goes: NFS keeps a name for an open file.
                    (self.path / LOCK_FILE).unlink()
            finally:
                os.close(self._lock)
                self._lock = None
        with suppress(OSError):
            # Not before it is empty.
            self.path.rmdir()
        while self._made:
            with suppress(OSError):
                self._made.pop().rmdir()

    def _make_parents(self) -> None:
        parents = [self.final.parent, *self.final.parent.parents]
        there = next(i for i, parent in enumerate(parents) if parent.exists())
        for parent in reversed(parents[:there]):
            with suppress(FileExistsError):
                parent.mkdir()
                self._made.append(parent)

    def _try_to_lock(self) -> int | None:
        """The lock's descriptor; None where its last holder removed the folder, or a parent, meanwhile."""
        try:
            with suppress(FileExistsError):
                self.path.mkdir()
            self._check_ours()
        except FileNotFoundError:
            return None
        busy = f"Another conversion is writing {self.final}. Wait until it ends, or name another path."
        return try_lock(self.path / LOCK_FILE, busy)

    def _check_ours(self) -> None:
        ours = not self.path.is_symlink() and stat.S_ISDIR(self.path.stat().st_mode)
        found = {entry.name for entry in self.path.iterdir()} if ours else set()
        # An empty one is that of a writer which has just made it, or was killed then.
        if not ours or (found and LOCK_FILE not in found) or found - {LOCK_FILE, "new", "old"}:
            raise UserError(
                f"{self.path} is where {self.final} would be prepared, and is not a conversion's. Move it away, or "
                "name another path."
            )
