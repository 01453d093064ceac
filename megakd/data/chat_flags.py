"""Flags in the data: which of the assistant's messages are learned, and how much each weighs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from megakd.data.chat_marks import ASSISTANT
from megakd.data.chat_template import Message, RecordError
from megakd.data.records import looks_like_flag, unknown_flag

SKIPPED_TURN = "turn flagged not to be learned"
WEIGHTED_TURN = "turn with a weight of its own"
FLAGGED_CONTEXT = "flag to learn a message that the assistant did not write, which is not done"
WRONG_FLAG = "flag that is not understood"

# On or off, as axolotl, OpenAI's and TRL's formats, ms-swift and others write it.
_SWITCHES = ("train", "trainable", "loss", "loss_mask")
_WEIGHT = "weight"
_WORDS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False, "on": True, "off": False}


class Weights(NamedTuple):
    """What each message's tokens weigh, 1 where nothing is said, and what the summary counts of it."""

    messages: list[float]
    notes: tuple[str, ...]


def message_weights(messages: Sequence[Message], name: str, record: Mapping[str, Any], known: Sequence[str]) -> Weights:
    """Read the flags of a record's messages, and the record's own, which holds for all of them.

    Args:
        name: the key of the messages, for errors.
        known: the record's keys that are no flags.

    Raises:
        RecordError: a value that no rule understands, or a weight that is negative or not finite.
    """
    notes: dict[str, None] = {}
    whole = example_weight(record, known, notes)
    weights = []
    for number, message in enumerate(messages):
        own, said = _weight(message, f"{name}[{number}]"), message["role"] == ASSISTANT
        if own and whole and not _is_kept(own * whole):
            raise RecordError(
                WRONG_FLAG, f"'{name}[{number}]' weighs {own:g} times the record's {whole:g}. Correct them"
            )
        for flags in (message, *_parts(message)):
            notes.update(dict.fromkeys(_unknown(flags, () if flags is message else None)))
        if said:
            notes.update(dict.fromkeys(counted(own * whole)))
        elif any(_is_on(message.get(key)) for key in _SWITCHES):
            notes[FLAGGED_CONTEXT] = None
        weights.append(own * whole)
    return Weights(weights, tuple(notes))


def example_weight(record: Mapping[str, Any], known: Sequence[str], notes: dict[str, None]) -> float:
    """What all of a record weighs; keys that look like flags and are not understood are added to `notes`.

    Raises RecordError on a weight that is negative or not finite.
    """
    notes.update(dict.fromkeys(_unknown(record, known)))
    flags = {key: record[key] for key in (_WEIGHT, *_SWITCHES) if key in record and key not in known}
    for key in _SWITCHES:
        # A column of figures may have such a name too.
        if key in flags and not _is_given(flags[key]):
            continue
        if key in flags and (isinstance(flags[key], float) or _switch(flags[key]) is None):
            notes[unknown_flag(key)] = None
            del flags[key]
    return _weight(flags, "")


def counted(weight: float) -> Iterator[str]:
    """Yield what the summary counts a turn of a weight by."""
    if weight == 0:
        yield SKIPPED_TURN
    elif weight != 1:
        yield WEIGHTED_TURN


def _weight(flags: Mapping[str, Any], place: str) -> float:
    """The product of all flags: one that says no is enough."""
    weight = _number(flags.get(_WEIGHT), f"{place}.{_WEIGHT}".lstrip("."))
    for key in _SWITCHES:
        if not _is_given(flags.get(key)):
            continue
        on = _switch(flags[key])
        if on is None:
            raise RecordError(
                WRONG_FLAG,
                f"'{f'{place}.{key}'.lstrip('.')}' is {flags[key]!r}; it must be true or false (or 1 or 0). A number "
                "that weighs is given as 'weight'",
            )
        weight *= on
    return weight


def _is_given(value: object) -> bool:
    """Whether a flag has a value; a table's cell is empty where its row has none."""
    return value is not None and not (isinstance(value, str) and not value.strip())


def _switch(value: object) -> bool | None:
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    return _WORDS.get(value.strip().lower()) if isinstance(value, str) else None


def _is_on(value: object) -> bool:
    return value is not None and _switch(value) is True


def _number(value: object, name: str) -> float:
    """A weight; 1 where none is given."""
    if not _is_given(value):
        return 1.0
    if isinstance(value, str) and value.strip().lower() in _WORDS:
        return float(_WORDS[value.strip().lower()])
    try:
        weight = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        weight = math.nan
    if not math.isfinite(weight) or weight < 0 or not _is_kept(weight):
        raise RecordError(
            WRONG_FLAG, f"'{name}' is {value!r}; it must be a number from 0 (not learned) to 1e38. Correct it"
        )
    return weight


def _is_kept(weight: float) -> bool:
    """Whether float32, as weights are kept, has it: one that rounds to nothing or to infinity is none."""
    with np.errstate(over="ignore", under="ignore"):
        kept = float(np.float32(weight))
    return math.isfinite(kept) and (kept > 0 or weight == 0)


def _parts(message: Message) -> list[Mapping[str, Any]]:
    """The parts of a content, where it is a list of them."""
    content = message.get("content")
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def _unknown(flags: Mapping[str, Any], known: Sequence[str] | None) -> Iterator[str]:
    """Notes of keys that look like flags; `known` is None where no flag at all is read."""
    read = () if known is None else (_WEIGHT, *_SWITCHES, *known)
    for key in flags:
        if looks_like_flag(key) and key not in read and _is_given(flags[key]):
            yield unknown_flag(key)
