"""Pickles in checkpoints, without running code: only the classes that torch's distributed checkpoint needs."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import IO, Any

import torch

from megakd.common.errors import UserError

_CHECKPOINT = "torch.distributed.checkpoint."
_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
    (_CHECKPOINT + "filesystem", "_StorageInfo"),
    (_CHECKPOINT + "filesystem", "_StoragePrefix"),
    *(
        (_CHECKPOINT + "metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *(
        (_CHECKPOINT + "planner", name)
        for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ),
}


class _Refused(Exception):
    """A name that no checkpoint needs."""


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """A class by its full name, if checkpoints need it."""
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module, name) not in _ALLOWED:
            raise _Refused(f"{module}.{name}")
        return super().find_class(module, name)


def load_metadata(file: IO[bytes], path: Path) -> Any:
    """Unpickle a checkpoint's `.metadata`.

    Raises:
        UserError: it asks for anything else than a checkpoint's own classes, or is damaged.
    """
    try:
        return _RestrictedUnpickler(file).load()
    except _Refused as error:
        raise UserError(
            f"{path} asks for {error}, which no checkpoint needs and which may run code; it was not loaded. Use a "
            "checkpoint from a source you trust."
        ) from error
    except Exception as error:
        # Bytes that are no pickle, or one of other things, fail in any way.
        raise UserError(f"{path} is damaged ({_first_line(error)}). Copy or write the checkpoint again.") from error


def load_object(data: bytes | Path, path: Path) -> Any:
    """What torch.save wrote, if it is made of tensors and plain values (torch's weights-only loading).

    Raises:
        UserError: it holds anything else, or is damaged.
    """
    try:
        return torch.load(io.BytesIO(data) if isinstance(data, bytes) else data, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next(
            (line for line in str(error).splitlines() if "Unsupported" in line or "global" in line.lower()), ""
        )
        raise UserError(
            f"{path} holds a Python object that may run code when loaded; it was not loaded ({reason.strip()[:200]}). "
            "Use a checkpoint from a source you trust."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({_first_line(error)}). Copy or write the checkpoint again.") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
