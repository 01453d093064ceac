"""What a record holds of the teacher, and the codecs that turn it into bytes and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

MAX_VOCAB_SIZE = 1 << 32


@dataclass(frozen=True)
class Rows:
    """What is known of the teacher at n positions.

    Attributes:
        ids: int64 [n, k], distinct in a row; -1 in empty slots.
        probabilities: float32 [n, k], 0 in empty slots.
        entropy: float32 [n], nats, of the whole distribution; None where the mode keeps none.
    """

    ids: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    entropy: NDArray[np.float32] | None = None


class Codec(Protocol):
    """One mode's bytes. `mode` is its name, `bytes_per_row` its size where all rows have one."""

    @property
    def mode(self) -> str: ...

    @property
    def bytes_per_row(self) -> float | None: ...

    def settings(self) -> dict[str, Any]:
        """JSON values from which `build_codec` makes the same codec."""
        ...

    def decode(self, record: bytes | memoryview, rows: int) -> Rows:
        """The rows of a record; raises ValueError where the bytes are not of so many rows."""
        ...


def build_codec(settings: Mapping[str, Any]) -> Codec:
    """The codec that has these settings; raises ValueError where there is none."""
    from megakd.cache.sampled import SampledCodec
    from megakd.cache.topk import TopKCodec

    kinds: dict[str, Any] = {"sampled": SampledCodec, "topk": TopKCodec}
    values = dict(settings)
    mode = values.pop("mode", None)
    if mode not in kinds:
        raise ValueError(f"mode {mode!r} is not one of {', '.join(kinds)}")
    try:
        codec: Codec = kinds[mode](**values)
    except TypeError as error:
        raise ValueError(f"settings of the mode {mode} are {values}") from error
    return codec


def check_whole(name: str, value: object, low: int, high: int) -> None:
    """Raise ValueError unless the value is an integer from low to high."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")


def check_ids(ids: NDArray[np.int64], ascending: NDArray[np.bool_] | bool, vocab_size: int) -> None:
    """Raise ValueError for ids beyond the vocabulary or out of order."""
    if not np.all(ascending):
        raise ValueError("ids are not in ascending order")
    if ids.size and int(ids.max()) >= vocab_size:
        raise ValueError(f"id {int(ids.max())} is beyond the vocabulary of {vocab_size}")


def check_entropy(entropy: NDArray[np.floating[Any]]) -> None:
    """Raise ValueError for one that cannot be."""
    if not np.all(np.isfinite(entropy) & (entropy >= 0)):
        raise ValueError("an entropy is below 0 or not finite")


class Fields:
    """Takes the fields of a record one after another; raises ValueError where it is too short, or not at its end."""

    def __init__(self, record: bytes | memoryview) -> None:
        self._bytes = np.frombuffer(record, dtype=np.uint8)
        self._at = 0

    def take(self, count: int) -> NDArray[np.uint8]:
        """The next `count` bytes."""
        if count > self.left:
            raise ValueError(f"{len(self._bytes)} bytes are too few")
        self._at += count
        return self._bytes[self._at - count : self._at]

    def array(self, dtype: str, count: int) -> NDArray[Any]:
        """The next `count` numbers."""
        size = np.dtype(dtype).itemsize
        return np.frombuffer(self.take(count * size).tobytes(), dtype=dtype)

    @property
    def left(self) -> int:
        """Bytes not taken."""
        return len(self._bytes) - self._at

    def end(self) -> None:
        """There must be nothing left."""
        if self.left:
            raise ValueError(f"{self.left} bytes are too many")
