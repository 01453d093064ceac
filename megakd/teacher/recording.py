"""From the teacher's hidden states to records of a cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megakd.cache.codec import Codec
from megakd.cache.offsets import draw_offsets
from megakd.cache.reader import sample_hash
from megakd.cache.sampled import SampledCodec
from megakd.cache.topk import TopKCodec
from megakd.common.errors import UserError
from megakd.data.batches import Batch, sample_segments
from megakd.losses import DenseSignal
from megakd.losses.shards import gather_sequence
from megakd.losses.sparse_targets import draw_systematically, find_largest


@dataclass(frozen=True)
class SampleRecord:
    """A sample's record: which positions are stored, [S], and the codec's bytes of them."""

    sample_id: int
    token_hash: int
    stored: NDArray[np.bool_]
    content: bytes

    @property
    def rows(self) -> int:
        """Positions stored."""
        return int(self.stored.sum())


class TeacherRecorder:
    """Keeps what a codec has room for of the teacher's distributions at the positions that count.

    Args:
        temperature: divides the teacher's logits.
        seed: of the draws.
        sequence_parallel: hidden states are spread over the ranks of `tp_group`.
    """

    def __init__(
        self,
        codec: Codec,
        *,
        temperature: float,
        seed: int,
        tp_group: dist.ProcessGroup,
        sequence_parallel: bool,
        chunk_mib: int | None,
    ) -> None:
        assert isinstance(codec, SampledCodec | TopKCodec), codec
        self._codec = codec
        self._seed = seed
        self._tp_group = tp_group
        self._sequence_group = tp_group if sequence_parallel else None
        self._settings = {
            "vocab_size": codec.vocab_size,
            "temperature": temperature,
            "tp_group": tp_group,
            "chunk_mib": chunk_mib,
        }

    def extract(self, batch: Batch, signal: DenseSignal) -> tuple[Tensor, ...]:
        """What the codec encodes, for the microbatch's positions that count, sample by sample; in main memory.

        Collective over the tensor ranks.

        Args:
            batch: in main memory.
        """
        counted = batch["loss_mask"].flatten().nonzero().squeeze(1)  # of tokens in (b, s) order
        batches, length = batch["tokens"].shape
        rows = (counted % length) * batches + counted // length  # of hidden states in (s, b) order
        hidden = gather_sequence(signal.hidden, self._sequence_group)
        hidden = hidden.index_select(0, rows.to(hidden.device))
        offsets = self._offsets(batch, counted).to(hidden.device)
        head, codec, settings = signal.head, self._codec, self._settings
        found: tuple[Tensor, ...]
        if isinstance(codec, SampledCodec):
            found = draw_systematically(hidden, head, offsets, num_samples=codec.num_samples, **settings)  # type: ignore[arg-type]
        else:
            tail = codec.tail_samples
            found = find_largest(hidden, head, k=codec.k, tail_offsets=offsets, tail_samples=tail, **settings)  # type: ignore[arg-type]
        return tuple(tensor.cpu() for tensor in found)

    def encode(self, batch: Batch, extracted: tuple[Tensor, ...], count: int) -> Iterator[SampleRecord]:
        """Records of the first `count` samples of a microbatch.

        Raises:
            UserError: the teacher's logits are not numbers.
        """
        samples = len(batch["sample_ids"])
        masks, tokens, positions = (
            batch[name].view(samples, -1).numpy() for name in ("loss_mask", "tokens", "position_ids")
        )
        segments = sample_segments(batch)
        ends = np.concatenate([[0], np.cumsum((masks != 0).sum(1))])
        for number in range(count):
            part = slice(int(ends[number]), int(ends[number + 1]))
            sample_id = int(batch["sample_ids"][number])
            try:
                content = self._codec.encode(*(tensor[part].numpy() for tensor in extracted))
            except ValueError as error:
                raise UserError(
                    f"the teacher's probabilities on sample {sample_id} cannot be stored: {error}. Look for logits "
                    "that are not numbers: try teacher.dtype fp32, and check the teacher's weights."
                ) from error
            key = sample_hash(tokens[number], positions[number], segments[number])
            yield SampleRecord(sample_id, key, masks[number] != 0, content)

    def _offsets(self, batch: Batch, counted: Tensor) -> Tensor:
        samples = len(batch["sample_ids"])
        length = batch["tokens"].numel() // samples
        places = counted.numpy()
        parts = [
            draw_offsets(self._seed, int(sample_id), places[places // length == number] % length)
            for number, sample_id in enumerate(batch["sample_ids"])
        ]
        return torch.from_numpy(np.concatenate(parts))
