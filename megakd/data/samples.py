"""Fixed-length samples of a token stream and the order in which training visits them."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megakd.common.errors import UserError


class Stream(Protocol):
    """A corpus as one stream of tokens; `megakd.data.indexed.TokenStream` is one."""

    prefix: str
    num_tokens: int

    def slice(self, start: int, stop: int) -> NDArray[np.int64]: ...


class TokenSamples:
    """Samples first..last of a stream cut once, in file order, every `sequence_length` tokens.

    Sample i is tokens [i*S, i*S + S + 1): S inputs and the S labels one further. A sample's id is i whatever
    `first` is, so an id names the same content in every view. `last` is exclusive. Raises UserError where the
    stream is shorter than one sample.
    """

    def __init__(self, stream: Stream, sequence_length: int, first: int = 0, last: int | None = None) -> None:
        total = (stream.num_tokens - 1) // sequence_length if stream.num_tokens else 0
        if total < 1:
            raise UserError(
                f"{stream.prefix} holds {stream.num_tokens} tokens; one sample needs data.sequence_length + 1 = "
                f"{sequence_length + 1}. Add documents or use a smaller data.sequence_length."
            )
        last = total if last is None else last
        assert 0 <= first < last <= total, (first, last, total)
        self.sequence_length = sequence_length
        self.first = first
        self.last = last
        self._stream = stream

    @property
    def num_samples(self) -> int:
        """How many samples this view has."""
        return self.last - self.first

    def tokens(self, sample_id: int) -> NDArray[np.int64]:
        """The sample's tokens [sequence_length + 1]."""
        assert self.first <= sample_id < self.last, (self.first, sample_id, self.last)
        start = sample_id * self.sequence_length
        return self._stream.slice(start, start + self.sequence_length + 1)


def split_samples(num_samples: int, valid_fraction: float) -> tuple[range, range]:
    """Sample ids to train on and, from the end, the share held out; at least one of each."""
    if num_samples < 2:
        raise UserError(
            f"data.valid_fraction is {valid_fraction}, but the data is {num_samples} sample; a split needs 2. "
            "Add documents, use a smaller data.sequence_length, or give data.valid instead."
        )
    held_out = min(max(round(num_samples * valid_fraction), 1), num_samples - 1)
    return range(num_samples - held_out), range(num_samples - held_out, num_samples)


class SampleOrder:
    """An endless sequence of epochs, each a permutation of 0..num_samples that (seed, epoch) alone fixes."""

    def __init__(self, num_samples: int, seed: int) -> None:
        assert num_samples > 0, num_samples
        self.num_samples = num_samples
        self.seed = seed
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def sample_ids(self, start: int, count: int) -> NDArray[np.int64]:
        """The samples at positions start..start + count, [count]; position p is in epoch p // num_samples."""
        positions = np.arange(start, start + count, dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.num_samples)
        ids = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            ids[here] = self._permutation(epoch)[offsets[here]]
        return ids

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._epochs:
            # numpy fixes a bit generator's raw output for good; Generator.permutation may change between versions.
            raw = np.random.Philox(np.random.SeedSequence([self.seed, epoch])).random_raw(self.num_samples)
            # A batch that crosses into this epoch still reads the one before.
            self._epochs = {e: ids for e, ids in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = np.argsort(raw, kind="stable").astype(np.int64, copy=False)
        return self._epochs[epoch]
