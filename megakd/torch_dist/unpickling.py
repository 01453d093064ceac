"""Pickles in checkpoints, without running code.

`.metadata` is unpickled into inert records, one kind for each class that torch's distributed checkpoint writes, and the
metadata is made from their checked fields: not even the classes themselves, which a pickle may alter for the whole
process, are in its reach.
"""

from __future__ import annotations

import argparse
import io
import pickle
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megakd.common.errors import UserError

_CHECKPOINT = "torch.distributed.checkpoint."


class _Refused(Exception):
    """A name that no checkpoint needs."""


class _Ambiguous(Exception):
    """A way to pickle an object that could leave a loader with another one than is checked."""


class _Record:
    """An object whose fields are checked: as writers pickle it, made without arguments and given its state once.

    A loader after the check unpickles real classes from the same bytes. Arguments, a second state, a state changed
    later or one that sets attributes (`__class__` among them) would let it see what was not checked.
    """

    state: Any = None

    def __new__(cls, *arguments: object) -> _Record:
        if arguments:
            raise _Ambiguous(f"{cls.__name__} is made with arguments")
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if self.state is not None:
            raise _Ambiguous(f"{type(self).__name__} is given its state twice")
        if type(state) is dict:
            state = dict(state)
        elif type(state) is not tuple or type(self) is not _PROPERTIES:
            raise _Ambiguous(f"{type(self).__name__} has a {type(state).__name__} for its state")
        self.state = state

    def __hash__(self) -> int:
        # A real key takes its place in a dict by the state that it has there.
        if self.state is None:
            raise _Ambiguous(f"{type(self).__name__} is a key before it has its state")
        return id(self)


class _Ignored:
    """An object that is not looked at."""

    def __new__(cls, *arguments: object) -> _Ignored:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...


def _record(name: str) -> type[_Record]:
    return type(name, (_Record,), {})


_METADATA, _TENSOR, _BYTES = _record("Metadata"), _record("TensorStorageMetadata"), _record("BytesStorageMetadata")
_PROPERTIES, _CHUNK = _record("TensorProperties"), _record("ChunkStorageMetadata")
_INDEX, _INFO = _record("MetadataIndex"), _record("_StorageInfo")
_ALLOWED: dict[tuple[str, str], Any] = {
    (_CHECKPOINT + "filesystem", "_StorageInfo"): _INFO,
    **{
        (_CHECKPOINT + "metadata", record.__name__): record
        for record in (_METADATA, _TENSOR, _BYTES, _PROPERTIES, _CHUNK, _INDEX)
    },
    # Not needed for reading: plans of the writer, where it was, how tensors lay in its memory.
    **{
        (module, name): _Ignored
        for module, names in (
            (_CHECKPOINT + "filesystem", ("_StoragePrefix",)),
            (_CHECKPOINT + "metadata", ("StorageMeta", "_MEM_FORMAT_ENCODING")),
            (
                _CHECKPOINT + "planner",
                ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
            ),
            ("pathlib", ("PosixPath",)),
            ("pathlib._local", ("PosixPath",)),
            ("torch.serialization", ("_get_layout",)),
        )
        for name in names
    },
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): _Ignored,
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name, if checkpoints need it."""
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module, name) not in _ALLOWED:
            full = f"{module}.{name}"
            raise _Refused(full[:100].encode("unicode_escape").decode())
        return _ALLOWED[module, name]


def load_metadata(file: IO[bytes], path: Path) -> Metadata:
    """Read a checkpoint's `.metadata`: what a reader needs of it.

    Raises:
        UserError: it asks for anything else than a checkpoint's own classes, is damaged, or something else.
    """
    try:
        found = _RestrictedUnpickler(file).load()
    except _Refused as error:
        raise UserError(
            f"{path} asks for {error}, which no checkpoint needs and which may run code; it was not loaded. Use a "
            "checkpoint from a source you trust."
        ) from error
    except _Ambiguous as error:
        raise UserError(
            f"{path} is pickled in a way that no checkpoint needs and that may hide code ({error}); it was not loaded. "
            "Use a checkpoint from a source you trust."
        ) from error
    except Exception as error:
        # Bytes that are no pickle, or one of other things, fail in any way.
        raise UserError(f"{path} is damaged ({_first_line(error)}). Copy or write the checkpoint again.") from error
    try:
        fields = _fields(found, _METADATA)
        entries = {_text(key): _entry(entry) for key, entry in _plain(fields["state_dict_metadata"]).items()}
        storage = {_index(index): _info(info) for index, info in _plain(fields["storage_data"]).items()}
    except (TypeError, KeyError, IndexError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} is not the metadata of a torch_dist checkpoint ({_first_line(error)}). Copy or write the "
            "checkpoint again."
        ) from error
    return Metadata(entries, storage_data=storage)


def _plain(value: Any) -> dict[Any, Any]:
    if type(value) is not dict:
        raise TypeError(f"{type(value).__name__} in the place of a dict")
    return value


def _entry(record: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(record, _BYTES):
        return BytesStorageMetadata()
    fields = _fields(record, _TENSOR)
    (dtype, *_) = _fields(fields["properties"], _PROPERTIES, tuple)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{dtype!r:.40} is not a type of tensors")
    chunks = [_fields(chunk, _CHUNK) for chunk in fields["chunks"]]
    return TensorStorageMetadata(
        TensorProperties(dtype=dtype),
        torch.Size(fields["size"]),
        [ChunkStorageMetadata(torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"])) for chunk in chunks],
    )


def _index(record: Any) -> MetadataIndex:
    fields = _fields(record, _INDEX)
    return MetadataIndex(_text(fields["fqn"]), fields.get("offset"), fields.get("index"))


def _info(record: Any) -> _StorageInfo:
    fields = _fields(record, _INFO)
    offset, length = fields["offset"], fields["length"]
    if not isinstance(offset, int) or not isinstance(length, int) or min(offset, length) < 0:
        raise TypeError(f"{offset!r:.40} and {length!r:.40} are no place in a file")
    return _StorageInfo(_text(fields["relative_path"]), offset, length, fields.get("transform_descriptors"))


def _fields(record: Any, kind: type[_Record], of: type = dict) -> Any:
    if not isinstance(record, kind) or not isinstance(record.state, of):
        raise TypeError(f"{type(record).__name__} in the place of {kind.__name__}")
    return record.state


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} in the place of a name")
    return value


def load_object(data: bytes | Path, path: Path) -> Any:
    """What torch.save wrote, if it is made of tensors and plain values (torch's weights-only loading).

    Raises:
        UserError: it holds anything else, or is damaged.
    """
    source = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        with torch.serialization.safe_globals(_not_yet_allowed()):
            return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds a Python object that may run code when loaded; it was not loaded ({_unsupported(error)}). "
            "Use a checkpoint from a source you trust."
        ) from error
    except Exception as error:
        raise UserError(f"{path} is damaged ({_first_line(error)}). Copy or write the checkpoint again.") from error


def _not_yet_allowed() -> list[Any]:
    """What Megatron-LM's arguments in common.pt need, unless megatron-core has allowed it for its own loading.

    torch takes back what it was told to allow for a while even where it was allowed before.
    """
    return [allowed for allowed in (argparse.Namespace,) if allowed not in torch.serialization.get_safe_globals()]


def _unsupported(error: pickle.UnpicklingError) -> str:
    """The line of torch's long message that names what it met."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0] if lines else "")[:200]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
