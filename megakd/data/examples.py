"""Samples of examples (chat, instructions): one each and padded, or packed several to a sample."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megakd.common.errors import UserError
from megakd.data.fingerprint import metadata_path, read_metadata
from megakd.data.indexed import MASK_ENDING, WEIGHT_ENDING, TokenStream, WeightStream
from megakd.data.packing import Packs, first_fit_decreasing
from megakd.data.records import CONTEXT, EARLIER, RESPONSE
from megakd.data.samples import Sample, positions_of

LossOn = Literal["assistant", "response", "all"]
Truncation = Literal["drop", "keep_start", "keep_end"]

_COUNTED: dict[LossOn, tuple[int, ...]] = {
    "assistant": (EARLIER, RESPONSE),
    "response": (RESPONSE,),
    "all": (CONTEXT, EARLIER, RESPONSE),
}
_LOST = {"keep_start": "keep the start and lose their end of turn", "keep_end": "keep the end and lose their start"}


class Examples:
    """Token ids of examples, which of them count and with what weight, by index.

    Raises:
        UserError: the pair, its mask or its weights are missing, damaged, or they are not of one data set.
    """

    def __init__(self, prefix: str, loss_on: LossOn, *, key: str = "data.train") -> None:
        self.prefix = prefix
        self._tokens = TokenStream(prefix, key=key)
        self._mask = TokenStream(f"{prefix}{MASK_ENDING}", key=key)
        self._weights = WeightStream(f"{prefix}{WEIGHT_ENDING}", key=key) if has_weights(prefix, key) else None
        self._key = key
        self.loss_on = loss_on
        self._counted = _COUNTED[loss_on]
        self.lengths = self._tokens.document_lengths()
        for ending, stream in ((MASK_ENDING, self._mask), (WEIGHT_ENDING, self._weights)):
            if stream is not None and not np.array_equal(self.lengths, stream.document_lengths()):
                raise UserError(
                    f"{key}: {prefix}{ending}.idx speaks of other examples than {prefix}.idx; they are not of one "
                    "data set. Write them again with tools/preprocess_data.py."
                )
        self._starts = np.zeros(len(self.lengths) + 1, dtype=np.int64)
        np.cumsum(self.lengths, out=self._starts[1:])

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, index: int, part: slice) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Token ids of a part of an example, [n], and the weight of each as a label, [n]: 0 where it does not count.

        Raises:
            UserError: a weight is negative or not finite.
        """
        first, last, _ = part.indices(int(self.lengths[index]))
        start = int(self._starts[index])
        counts = np.isin(self._mask.slice(start + first, start + last), self._counted).astype(np.float32)
        if self._weights is not None:
            weights = self._weights.slice(start + first, start + last)
            self._check_weights(weights, index, first)
            counts *= weights
        return self._tokens.slice(start + first, start + last), counts

    def _check_weights(self, weights: NDArray[np.float32], index: int, first: int) -> None:
        wrong = np.flatnonzero(~((weights >= 0) & np.isfinite(weights)))
        if len(wrong):
            raise UserError(
                f"{self._key}: {self.prefix}{WEIGHT_ENDING}.bin has {weights[wrong[0]]} as the weight of token "
                f"{first + int(wrong[0])} of example {index}; it must be a finite number of at least 0. Write the data "
                "again with tools/preprocess_data.py."
            )


def has_weights(prefix: str | Path, key: str) -> bool:
    """Whether tokens of a data set have weights beside the mask; of one without metadata its files tell.

    Raises:
        UserError: metadata and files contradict each other.
    """
    index = Path(f"{prefix}{WEIGHT_ENDING}.idx")
    metadata = read_metadata(prefix)
    if metadata is None:
        return index.is_file()
    said = bool(metadata.get("weights", False))
    if said and not index.is_file():
        raise UserError(
            f"{key}: {prefix} is a data set with token weights and {index} does not exist. Copy it too, or write the "
            "data again with tools/preprocess_data.py."
        )
    if index.is_file() and not said:
        raise UserError(
            f"{key}: {metadata_path(prefix)} says nothing of token weights and {index} exists, so one of them is of "
            f'another data set. Remove {prefix}{WEIGHT_ENDING}.*, or write "weights": true there if they belong to it.'
        )
    return said


@dataclass(frozen=True)
class Fit:
    """How examples fit into samples: what was cut or left out, and the share of padding one example to a sample.

    Attributes:
        examples: how many there are, before any is dropped.
        too_long: how many do not fit; with `cut` they were cut, else dropped.
        uncounted: how many of those that were cut had no token left to learn from, and were dropped.
        too_short: how many are a single token, from which nothing is predicted, and were dropped.
    """

    examples: int
    too_long: int
    uncounted: int
    too_short: int
    truncation: Truncation
    padding_unpacked: float
    padding: float
    samples: int
    sequence_length: int

    def describe(self, key: str, prefix: str) -> list[str]:
        """Lines on what was done to the data."""
        whole = self.sequence_length + 1
        lines = []
        if self.too_long:
            done = "are dropped" if self.truncation == "drop" else _LOST[self.truncation]
            rest = (
                f"; {self.uncounted:,} of them have no token left that counts and are dropped" if self.uncounted else ""
            )
            lines.append(
                f"{key}: {self.too_long:,} of {self.examples:,} examples in {prefix} are longer than "
                f"data.sequence_length + 1 = {whole:,} tokens and {done}{rest} (data.truncation {self.truncation})"
            )
        if self.too_short:
            lines.append(f"{key}: {self.too_short:,} examples in {prefix} are a single token and are dropped")
        packed = self.padding != self.padding_unpacked
        lines.append(
            f"{key}: {self.examples - self.dropped:,} examples of {prefix} in {self.samples:,} samples; padding "
            + (f"{self.padding_unpacked:.1%} unpacked, {self.padding:.1%} packed" if packed else f"{self.padding:.1%}")
        )
        return lines

    @property
    def dropped(self) -> int:
        """How many examples no sample holds."""
        return (self.too_long if self.truncation == "drop" else self.uncounted) + self.too_short


class ExampleSamples:
    """Samples of S positions made of examples; an example of n tokens takes n - 1, for its last is only predicted.

    Args:
        members: which examples are there, such as the training part of a split.
        truncation: what becomes of an example of more than S + 1 tokens.
        packing: put several examples into a sample (first-fit decreasing), each attending to itself alone; without,
            each has a sample of its own. What is left of a sample is padding that does not count.

    Raises:
        UserError: no example is left, or none that has a token to learn from.
    """

    def __init__(
        self, examples: Examples, members: range, sequence_length: int, *, truncation: Truncation, packing: bool
    ) -> None:
        self.sequence_length = sequence_length
        self.has_segments = packing
        self._examples = examples
        self._part = slice(-sequence_length - 1, None) if truncation == "keep_end" else slice(sequence_length + 1)
        lengths = examples.lengths[members.start : members.stop]
        long, short = lengths > sequence_length + 1, lengths < 2
        dropped = short.copy()
        uncounted = 0
        if truncation == "drop":
            dropped |= long
        else:
            for place in np.flatnonzero(long).tolist():
                _, counts = examples.read(members.start + place, self._part)
                if not counts[1:].any():
                    dropped[place] = True
                    uncounted += 1
        self._kept = members.start + np.flatnonzero(~dropped)
        if not len(self._kept):
            raise UserError(
                f"{examples.prefix}: none of its {len(members):,} examples is left: {int(long.sum()):,} are longer "
                f"than data.sequence_length + 1 = {sequence_length + 1:,} tokens (data.truncation {truncation}) and "
                f"{int(short.sum()):,} are a single token. Use a larger data.sequence_length, or another "
                "data.truncation."
            )
        self._check_counted()
        places = np.minimum(lengths[~dropped], sequence_length + 1).astype(np.int64) - 1
        self._packs: Packs | None = first_fit_decreasing(places, sequence_length) if packing else None
        self.num_samples = len(self._kept) if self._packs is None else len(self._packs)
        filled = int(places.sum()) / sequence_length
        self.fit = Fit(
            examples=len(members),
            too_long=int(long.sum()),
            uncounted=uncounted,
            too_short=int(short.sum()),
            truncation=truncation,
            padding_unpacked=1 - filled / len(self._kept),
            padding=1 - filled / self.num_samples,
            samples=self.num_samples,
            sequence_length=sequence_length,
        )

    def _check_counted(self) -> None:
        """Refuse examples of which nothing can be learned; reads up to the first of which something can."""
        examples = self._examples
        if not any(examples.read(int(place), self._part)[1][1:].any() for place in self._kept):
            raise UserError(
                f"{examples.prefix}: none of the {len(self._kept):,} examples that are left has a token that counts "
                f"with data.loss_on {examples.loss_on}: their turns are flagged not to be learned, or weigh 0. Use "
                "another data.loss_on (`all` takes what is no assistant's turn too), or write the data with turns to "
                "learn from."
            )

    def sample(self, sample_id: int) -> Sample:
        """See Samples."""
        assert 0 <= sample_id < self.num_samples, (sample_id, self.num_samples)
        places = [sample_id] if self._packs is None else self._packs[sample_id].tolist()
        tokens, labels = (np.zeros(self.sequence_length, dtype=np.int64) for _ in range(2))
        loss_mask = np.zeros(self.sequence_length, dtype=np.float32)
        segments, end = [], 0
        for place in places:
            ids, counts = self._examples.read(int(self._kept[place]), self._part)
            start, end = end, end + len(ids) - 1
            tokens[start:end], labels[start:end], loss_mask[start:end] = ids[:-1], ids[1:], counts[1:]
            segments.append(len(ids) - 1)
        if end < self.sequence_length:
            segments.append(self.sequence_length - end)
        positions = positions_of(segments if self.has_segments else [self.sequence_length])
        return Sample(tokens, labels, loss_mask, positions, tuple(segments) if self.has_segments else (len(tokens),))
