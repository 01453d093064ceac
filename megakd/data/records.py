"""What passes between the parts of preprocessing: sources yield records, encoders make documents of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megakd.data.tokenizer import Tokenizer

# One JSON object, table row or text file: those of the encoder's fields that are there, at least one.
Record = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """Why a record becomes no document.

    `reason` is one of few short phrases, by which problems are counted; `detail` tells the person what is wrong here,
    and `remedy` what to do about it where that is more than to correct the record. None ends in a full stop, and none
    says where: the place is known to whoever read the record.
    """

    reason: str
    detail: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


# What a token of an example is: nothing to be learned, of an assistant's turn before the last, of the last one, or of a
# turn that is flagged not to be learned, whatever data.loss_on says.
CONTEXT, EARLIER, RESPONSE, SKIPPED = 0, 1, 2, 3
# Of the masks in a data set. 1 knows no SKIPPED and no weights beside the mask.
MASK_VERSION = 2

NO_END = "response without an end-of-turn token"
EMPTY_TURN = "empty response before the last"
SKIPPED_LAST = "last turn flagged not to be learned"
LEFT_OUT = "text that the chat template leaves out"
UNREAD_VARIABLE = "template variable that the chat template does not read"
SPECIAL_TEXT = "special token's text in the content"

UNKNOWN_FLAG = "key that looks like a flag and is not understood: "

# What a source yields: the line (of a JSON or CSV file) or row (of a parquet or Arrow file) from 1, and what is there.
Item = tuple[int, Record | Problem]

MISSING_KEY = "missing key"
# The problems that never stop a run: a record that is in order and has nothing to learn from.
EMPTY = Problem("empty")
ALL_SKIPPED = Problem("nothing to learn", "all assistant turns are flagged not to be learned")
IN_ORDER = (EMPTY, ALL_SKIPPED)
NOT_UTF8 = Problem("not UTF-8 text")


class Encoded(NamedTuple):
    """A document: token ids [n], any integer type, n > 0, and for examples a mask [n] of CONTEXT, EARLIER, RESPONSE and
    SKIPPED.

    `weights` are [n], what each token's loss is multiplied by: finite and above 0, since what is not to be learned is
    for the mask to say; None where all are 1. `notes` are short phrases such as NO_END: what the summary counts
    documents by, though nothing is wrong with them.
    """

    ids: NDArray[np.integer[Any]]
    mask: NDArray[np.uint8] | None = None
    notes: tuple[str, ...] = ()
    weights: NDArray[np.float32] | None = None


class RecordEncoder(Protocol):
    """Turns records into documents; may be called from two threads at once."""

    def encode(self, records: Sequence[Record]) -> list[Encoded | Problem]:
        """One result per record, in order; raises UserError only for what no other record would change."""
        ...


class EncoderSettings(Protocol):
    """What an encoder is made from: a frozen dataclass of JSON values, pickled into each worker process.

    A run that was interrupted goes on only with equal settings. `fields` are the keys or columns to read; a record
    has at least one of them, and what else it must have is for `encode` to say. With `masks` every `Encoded` has a
    mask, and the data set is of the kind "examples" instead of "text".
    """

    @property
    def fields(self) -> tuple[str, ...]: ...

    @property
    def masks(self) -> bool: ...

    def build(self, tokenizer: Tokenizer) -> RecordEncoder:
        """The encoder, in the process that uses it; raises UserError where the tokenizer lacks what it needs."""
        ...

    def metadata(self) -> dict[str, Any]:
        """What `<prefix>.json` says of the settings, for example {"appended_eod": True, "prepended_bos": False}."""
        ...


def unknown_flag(key: str) -> str:
    """The note of a key that looks like a flag, and that nothing reads."""
    return f"{UNKNOWN_FLAG}{key[:60]!r}"


def text_problem(text: object, name: str) -> Problem | None:
    """What keeps a value from being text that a tokenizer takes, or None; `name` is the key that messages name."""
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        return Problem("wrong type", f"'{name}' is a {kind}, not a string")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return Problem("half a surrogate pair", f"'{name}' has one, which is no text")
    return None


# Parts of the names under which data sets flag what of a record is to be learnt: `weight`, `train_on`, `loss_mask`.
_FLAG_PARTS = ("loss", "train", "mask", "weight")


@lru_cache(maxsize=4096)
def looks_like_flag(key: str) -> bool:
    """Return whether a record's key may say what of the record is to be learnt, or how much: `weight`, `loss_mask`."""
    lower = key.lower()
    return any(part in lower for part in _FLAG_PARTS)


def chosen_keys(there: Collection[str], fields: Sequence[str], flags: bool) -> list[str]:
    """Return the keys or columns of a record that are read: the fields that are there, and with `flags` what may flag.

    Empty where none of the fields is there: flags alone are no record.
    """
    chosen = [name for name in fields if name in there]
    if chosen and flags:
        chosen += [name for name in there if name not in chosen and looks_like_flag(name)]
    return chosen


def missing_key(fields: Sequence[str], there: Iterable[str]) -> Problem:
    """None of the fields is among the keys that are there."""
    wanted = " or ".join(f"'{name}'" for name in fields)
    shown = ", ".join(list(there)[:20]) or "none"
    return Problem(MISSING_KEY, f"no {wanted} (there: {shown})")


def damage(error: Exception) -> Problem:
    """A file that cannot be read on, by what its reader says of it; the reading of the file ends there."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return Problem("damaged file", " ".join(said.split())[:300].rstrip("."))
