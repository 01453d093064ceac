"""Samples of fixed length: what training reads one by one, whatever data they come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megakd.common.errors import UserError

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """One sample of s positions: at each, a token and the label that is predicted from it.

    Attributes:
        tokens, labels: int64 [s].
        loss_mask: float32 [s], 1 where the prediction counts.
        position_ids: int64 [s].
        segments: lengths of the stretches within which tokens attend to each other; they add up to s.
    """

    tokens: Ids
    labels: Ids
    loss_mask: NDArray[np.float32]
    position_ids: Ids
    segments: tuple[int, ...]


class Samples(Protocol):
    """Samples by id, from 0; an id names the same content for good.

    `has_segments` says that attention may end inside a sample.
    """

    num_samples: int
    sequence_length: int
    has_segments: bool

    def sample(self, sample_id: int) -> Sample: ...


class Stream(Protocol):
    """A corpus as one stream of tokens; `megakd.data.indexed.TokenStream` is one."""

    prefix: str
    num_tokens: int

    def slice(self, start: int, stop: int) -> Ids: ...

    def document_starts(self, start: int, stop: int) -> Ids:
        """Where documents begin among the tokens start..stop."""
        ...


class TokenSamples:
    """Samples of a stream cut once, in file order, every `sequence_length` tokens.

    Sample i is tokens [i*S, i*S + S + 1): S inputs and the S labels one further.

    Args:
        reset_position_ids: positions begin again at 0 with each document.
        reset_attention_mask: tokens attend to their own document alone.
        eod_mask_loss: the first token of a document is not predicted from the last of the one before it.

    Raises:
        UserError: the stream is shorter than one sample.
    """

    def __init__(
        self,
        stream: Stream,
        sequence_length: int,
        *,
        reset_position_ids: bool = False,
        reset_attention_mask: bool = False,
        eod_mask_loss: bool = False,
    ) -> None:
        self.num_samples = (stream.num_tokens - 1) // sequence_length if stream.num_tokens else 0
        if self.num_samples < 1:
            raise UserError(
                f"{stream.prefix} holds {stream.num_tokens} tokens; one sample needs data.sequence_length + 1 = "
                f"{sequence_length + 1}. Add documents or use a smaller data.sequence_length."
            )
        self.sequence_length = sequence_length
        self.has_segments = reset_attention_mask
        self._stream = stream
        self._resets_positions = reset_position_ids
        self._masks_ends = eod_mask_loss

    def sample(self, sample_id: int) -> Sample:
        """See Samples."""
        assert 0 <= sample_id < self.num_samples, (sample_id, self.num_samples)
        length, start = self.sequence_length, sample_id * self.sequence_length
        read = self._stream.slice(start, start + length + 1)
        whole = (length,)
        loss_mask = np.ones(length, dtype=np.float32)
        if not (self.has_segments or self._resets_positions or self._masks_ends):
            return Sample(read[:-1], read[1:], loss_mask, np.arange(length), whole)
        # Of the labels too: a document may begin with the last one.
        begins = self._stream.document_starts(start + 1, start + length + 1) - start
        inner = tuple(np.diff(begins[begins < length], prepend=0, append=length).tolist())
        if self._masks_ends:
            loss_mask[begins - 1] = 0
        positions = positions_of(inner if self._resets_positions else whole)
        return Sample(read[:-1], read[1:], loss_mask, positions, inner if self.has_segments else whole)


def positions_of(segments: Iterable[int]) -> Ids:
    """Positions that begin at 0 in each segment."""
    return np.concatenate([np.arange(segment, dtype=np.int64) for segment in segments])


class Blend:
    """Samples of several data sets under one numbering: each one's ids follow those of the one before."""

    def __init__(self, parts: Sequence[Samples]) -> None:
        self.parts = tuple(parts)
        lengths = {part.sequence_length for part in parts}
        assert len(lengths) == 1, lengths
        self.sequence_length = lengths.pop()
        self.has_segments = any(part.has_segments for part in parts)
        self._ends = np.cumsum([part.num_samples for part in parts])
        self.num_samples = int(self._ends[-1])

    def sample(self, sample_id: int) -> Sample:
        """See Samples."""
        number = int(np.searchsorted(self._ends, sample_id, side="right"))
        part = self.parts[number]
        return part.sample(sample_id - int(self._ends[number]) + part.num_samples)

    def first_id(self, number: int) -> int:
        """The id in the blend of a part's sample 0."""
        return int(self._ends[number]) - self.parts[number].num_samples

    def ids(self, number: int, own: range) -> range:
        """Ids in the blend of these samples of one part."""
        first = self.first_id(number)
        return range(first + own.start, first + own.stop)


@dataclass(frozen=True)
class Split:
    """Which items of a data set, in file order, are for training and, from its end, held out."""

    train: range
    valid: range
    test: range


def split_items(count: int, valid_fraction: float, test_fraction: float = 0.0) -> Split:
    """Split items of a data set: at least one for each purpose that is asked for.

    Raises:
        UserError: there are too few.
    """
    fractions = {"data.valid_fraction": valid_fraction, "data.test_fraction": test_fraction}
    asked = {key: fraction for key, fraction in fractions.items() if fraction > 0}
    if count < 1 + len(asked):
        said = " and ".join(f"{key} is {fraction}" for key, fraction in asked.items())
        raise UserError(
            f"{said}, but the data is {count} sample{'s' if count > 1 else ''}; a split needs {1 + len(asked)}. "
            "Add documents, use a smaller data.sequence_length, or give held-out files of their own."
        )
    valid, test = (max(1, round(count * fraction)) if fraction > 0 else 0 for fraction in fractions.values())
    # Rounding up may leave nothing to train on.
    while count - valid - test < 1:
        valid, test = (valid - 1, test) if valid >= test else (valid, test - 1)
    ends = (count - valid - test, count - test, count)
    return Split(range(ends[0]), range(ends[0], ends[1]), range(ends[1], ends[2]))
