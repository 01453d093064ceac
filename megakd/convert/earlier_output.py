"""What a conversion may replace: an earlier one's output, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from megakd.common.errors import UserError


@dataclass(frozen=True)
class OutputKind:
    """What one direction of the converter writes, by which its output is told from any other folder."""

    word: str
    """Name of the direction, for messages."""
    files: frozenset[str]
    """Patterns of the names of all files it may write, those in subfolders with the subfolder's name."""
    required: tuple[tuple[str, ...], ...]
    """Names of which every output has one, group by group."""

    def check(self, out: str | Path, *, overwrite: bool) -> None:
        """Refuse an output that exists, or with `overwrite` one that is anything but empty or an earlier output.

        Raises:
            UserError: it is such an output.
        """
        place = real_path(out)
        if not os.path.lexists(place):
            return
        if not place.is_dir():
            raise UserError(f"{out} exists and is not a folder. Name another path.")
        if not overwrite:
            raise UserError(f"{out} exists. Name another path, or give --overwrite to replace it.")
        if os.path.ismount(place):
            raise UserError(f"{out} is a mount point, which cannot be replaced. Name a folder in it.")
        foreign = next(self._foreign(place), None)
        if foreign is not None:
            raise UserError(
                f"{out} holds {foreign}, which no {self.word} writes; the {self.word} would replace it. Name another "
                "path."
            )
        if any(place.iterdir()):
            for names in self.required:
                if not any((place / name).is_file() for name in names):
                    raise UserError(
                        f"{out} has no {' or '.join(names)}, which every {self.word} writes; what it holds is not an "
                        "earlier one's. Name another path."
                    )

    def _foreign(self, folder: Path, inside: str = "") -> Iterator[str]:
        for entry in sorted(folder.iterdir()):
            name = inside + entry.name
            if entry.is_dir() and not entry.is_symlink() and any(file.startswith(f"{name}/") for file in self.files):
                yield from self._foreign(entry, f"{name}/")
            elif entry.is_symlink() or not entry.is_file() or not any(fnmatchcase(name, file) for file in self.files):
                yield name


def real_path(out: str | Path) -> Path:
    """Where an output goes, with its links followed, also one whose target is yet to be made.

    Raises:
        UserError: `out` is empty, or a link that leads nowhere.
    """
    if not os.fspath(out):
        raise UserError("The output's path is empty. Name the folder to write.")
    place = Path(os.path.realpath(out))
    if place.is_symlink():
        raise UserError(f"{out} is a link that leads to itself. Remove it, or name another path.")
    return place


def check_apart(out: str | Path, *sources: str | Path | None) -> None:
    """Refuse an output that is, lies in or holds a folder the model comes from.

    Raises:
        UserError: it does.
    """
    place = real_path(out)
    for source in sources:
        origin = None if source is None else Path(os.path.realpath(source))
        if origin == place:
            raise UserError(f"{out} is where the model comes from; the export would replace it. Name another path.")
        if origin in place.parents:
            raise UserError(f"{out} lies in {source}, where the model comes from. Name another path.")
        if origin is not None and place in origin.parents:
            raise UserError(f"{out} holds {source}, where the model comes from. Name another path.")
