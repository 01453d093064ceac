"""A Hugging Face folder's weights: one safetensors file or several with an index, read slice by slice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megakd.common.errors import UserError, nearest

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Parts of a name that stand for what a module was wrapped in when it was saved.
_WRAPPERS = r"(?:^|(?<=\.))(?:(?:_orig_mod|module)\.)+"

_POINTER = b"version https://git-lfs"


class SafetensorsFolder:
    """Weights by name; a file is mapped when first asked for and only its header and the slices asked for are read.

    A weight that was saved out of a wrapped module (torch.compile's, data parallelism's) has the name it has without.

    Args:
        prefix: what every weight's name should begin with; where none does, the folder's names are taken without it.

    Raises:
        UserError: the folder, a file or a weight is missing or damaged, or the weights are pickled.
    """

    def __init__(self, path: str | Path, prefix: str = "") -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{self.path} is not a folder. Give a local Hugging Face folder with {SINGLE_FILE}.")
        # safe_open's methods carry no annotations.
        self._handles: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        if (self.path / SINGLE_FILE).is_file():
            self._file_of = dict.fromkeys(self._open(SINGLE_FILE).keys(), SINGLE_FILE)
        elif (self.path / INDEX_FILE).is_file():
            self._file_of = self._read_index()
        else:
            raise UserError(self._no_safetensors())
        self._stored_name = self._names(prefix)

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handles.clear()

    @property
    def names(self) -> list[str]:
        """Names of all weights."""
        return list(self._stored_name)

    @property
    def unwrapped(self) -> dict[str, str]:
        """Names of weights by what the files call them, where the files have them out of wrapped modules."""
        return {stored: name for name, stored in self._stored_name.items() if re.search(_WRAPPERS, stored)}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight, from its file's header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Safetensors' word for a weight's type, such as BF16."""
        return str(self._slice(name).get_dtype())

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        """Read a weight, or only its part in `slices`, one slice per leading dim."""
        part: Tensor = self._slice(name)[slices or (slice(None),)]
        return part

    def _names(self, prefix: str) -> dict[str, str]:
        """The name in the files of each weight."""
        stored: dict[str, str] = {}
        for name in self._file_of:
            plain = re.sub(_WRAPPERS, "", name)
            if plain in stored:
                raise UserError(
                    f"{self.path} has the weight {plain} twice, as {stored[plain]} and as {name}. Remove one, or save "
                    "the model out of its wrappers (torch.compile's _orig_mod, data parallelism's module)."
                )
            stored[plain] = name
        bare = not any(name.startswith(prefix) for name in stored)
        return {(prefix if bare else "") + name: named for name, named in stored.items()}

    def _slice(self, name: str) -> Any:
        if name not in self._stored_name:
            raise UserError(f"{self.path} has no weight {name}.{nearest(name, self._stored_name)}")
        stored = self._stored_name[name]
        return self._open(self._file_of[stored]).get_slice(stored)

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            try:
                handle: Any = safe_open(str(self.path / file), framework="pt", device="cpu")
            except SafetensorError as error:
                if _is_pointer(self.path / file):
                    raise UserError(
                        f"{self.path / file} is git-lfs's note of a file that was not downloaded. Run `git lfs pull` "
                        "in the folder."
                    ) from error
                raise UserError(
                    f"{self.path / file} is not a whole safetensors file ({error}). Download or save it again."
                ) from error
            # Where there is no room to map it, safetensors raises a MemoryError and torch a RuntimeError.
            except (OSError, MemoryError, RuntimeError) as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    f"{self.path / file} cannot be opened ({reason}). It must be a file that can be read, and fit "
                    "twice into the address space that a process may have (`ulimit -v`)."
                ) from error
            self._check_index(file, set(handle.keys()))
            self._handles[file] = handle
        return self._handles[file]

    def _check_index(self, file: str, present: set[str]) -> None:
        """Hold a file against the index, where there is one."""
        index = self.path / INDEX_FILE
        for name, named_file in self._file_of.items():
            if named_file == file and name not in present:
                raise UserError(f"{index} puts weight {name} in {file}, which does not hold it.")
        for name in sorted(present if self._file_of else ()):
            if self._file_of.get(name) != file:
                said = f"puts it in {self._file_of[name]}" if name in self._file_of else "does not list it"
                raise UserError(
                    f"{self.path / file} holds weight {name}, and {INDEX_FILE} {said}. Download or save the folder "
                    "again."
                )

    def _read_index(self) -> dict[str, str]:
        index = self.path / INDEX_FILE
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = {str(name): str(file) for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is not an index of safetensors: it must be JSON with `weight_map`.") from error
        for name, file in names.items():
            # An index is data from elsewhere: it may name files of its own folder only.
            if Path(file).name != file or not (self.path / file).is_file():
                raise UserError(
                    f"{index} puts weight {name} in {file}, which is not in the folder. Download the folder again."
                )
        return names

    def _no_safetensors(self) -> str:
        pickled = sorted(
            entry.name for entry in self.path.iterdir() if entry.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
        )
        if pickled:
            return (
                f"{self.path} holds pickled weights only ({pickled[0]}), which can run code when loaded and are never "
                "read. Convert them with transformers' save_pretrained(..., safe_serialization=True)."
            )
        return f"{self.path} has neither {SINGLE_FILE} nor {INDEX_FILE}."


def _is_pointer(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(len(_POINTER)) == _POINTER
    except OSError:
        return False
