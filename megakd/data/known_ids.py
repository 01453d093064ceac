"""Token ids against the rows of the embeddings that look them up: nothing else notices an id without a row.

megatron-core's embedding gives zeros for an id that no tensor rank has, and where there is one rank a bare IndexError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megakd.common.errors import UserError
from megakd.data.fingerprint import read_metadata
from megakd.data.indexed import TokenStream
from megakd.data.samples import Sample, Samples

# Reading so much takes a second or so; of larger data ids are checked as they are read.
_READ_WHOLE_BYTES = 2**28
_BLOCK = 2**20


@dataclass(frozen=True)
class EmbeddingRows:
    """How many ids a model knows, from 0 on.

    Attributes:
        model: what messages call it, such as "the teacher (teacher.path: /models/teacher)".
        remedy: how it gets rows for more, as a whole sentence.
    """

    model: str
    rows: int
    remedy: str

    def lacks(self, index: int) -> str:
        """Say that it has no row for an id."""
        return f"{self.model} has rows for the ids 0 to {self.rows - 1} and none for {index}. {self.remedy}"


class CheckedSamples:
    """Samples of a data set whose ids every model knows.

    Args:
        rows: of the models that read them.
        key: the configuration key that names the data set, for messages.
        prefix: the data set.
    """

    def __init__(self, samples: Samples, rows: Sequence[EmbeddingRows], *, key: str, prefix: str) -> None:
        self.num_samples, self.sequence_length = samples.num_samples, samples.sequence_length
        self.has_segments = samples.has_segments
        self._samples, self._fewest = samples, min(rows, key=lambda model: model.rows)
        self._key, self._prefix = key, prefix

    def sample(self, sample_id: int) -> Sample:
        """See Samples.

        Raises:
            UserError: a token, or a label that counts, is no id of each model.
        """
        sample = self._samples.sample(sample_id)
        for ids in (sample.tokens, sample.labels[sample.loss_mask != 0]):
            if not len(ids):
                continue
            lowest, highest = int(ids.min()), int(ids.max())
            if highest >= self._fewest.rows:
                raise UserError(f"{self._where(sample_id)} the id {highest}, and {self._fewest.lacks(highest)}")
            if lowest < 0:
                raise UserError(f"{self._where(sample_id)} {lowest}, which is no id. Write the data again.")
        return sample

    def _where(self, sample_id: int) -> str:
        return f"{self._key}: sample {sample_id} of {self._prefix} has"


def check_ids(prefix: str, rows: Sequence[EmbeddingRows], *, key: str = "data.train") -> None:
    """Check that every model knows the ids of a data set, as far as that can be known soon.

    What the largest id is, the data's description says; else the data is read, or where it is large the tokenizer that
    the description names counts.

    Raises:
        UserError: a model has no row for an id.
    """
    lacking = sorted(rows, key=lambda model: model.rows)
    metadata = read_metadata(prefix)
    recorded: int | None = None if metadata is None else metadata.get("max_id")
    ids = None if metadata is None else int(metadata["tokenizer"]["vocab_size"])
    if recorded is None and (ids is None or ids > lacking[0].rows):
        recorded = _largest_id(prefix, key)
    if recorded is None:
        if ids is not None and ids > lacking[0].rows:
            raise UserError(
                f"{key}: {prefix} was written with a tokenizer of {ids} ids, and {lacking[0].lacks(ids - 1)} If the "
                "data has no such id, write it again: its description then says which is the largest."
            )
    elif recorded >= lacking[0].rows:
        raise UserError(f"{key}: {prefix} has the id {recorded}, and {lacking[0].lacks(recorded)}")


def _largest_id(prefix: str, key: str) -> int | None:
    """The largest id of a data set; None where it is too large to be read for that."""
    stream = TokenStream(prefix, key=key)
    if Path(f"{prefix}.bin").stat().st_size > _READ_WHOLE_BYTES:
        return None
    starts = range(0, stream.num_tokens, _BLOCK)
    return max(int(np.max(stream.slice(start, min(start + _BLOCK, stream.num_tokens)))) for start in starts)
