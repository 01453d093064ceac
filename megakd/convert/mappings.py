"""The algebra between a megatron-core parameter and the Hugging Face weights it is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megakd.config.architecture import GPTArchitecture
from megakd.convert.safetensors_folder import SafetensorsFolder
from megakd.parameters.sharding import Block, join_blocks

Shape = tuple[int, ...]
Strip = tuple[int, int, Tensor]
"""Rows of a Hugging Face weight: which of the parameter's weights, the first row, the rows (possibly a view)."""


class WeightMapping(Protocol):
    """Between one parameter, whole and padded, and its Hugging Face weights, both ways."""

    def hf_shapes(self, shape: Shape, architecture: GPTArchitecture) -> tuple[Shape, ...]:
        """Shapes of the Hugging Face weights of a parameter of `shape`."""

    def row_step(self, architecture: GPTArchitecture) -> int:
        """Blocks of the parameter start and end at multiples of this many rows."""

    def read(
        self, folder: SafetensorsFolder, hf_names: Sequence[str], block: Block, architecture: GPTArchitecture
    ) -> Tensor:
        """Read a block of the parameter, and no more of the files than it needs."""

    def export_step(self, architecture: GPTArchitecture) -> int | None:
        """Blocks that can be exported start and end at multiples of this many rows; None where only the whole can."""

    def export(self, part: Tensor, architecture: GPTArchitecture, first_row: int = 0) -> Iterator[Strip]:
        """What the parameter, or a block of it that starts at `first_row`, is of its Hugging Face weights."""


@dataclass(frozen=True)
class _Oriented:
    """Weights stored [out, in] as megatron-core's are, or [in, out] (`transposed`, transformers' Conv1D)."""

    transposed: bool = False

    def row_step(self, architecture: GPTArchitecture) -> int:
        """See WeightMapping.row_step."""
        return 1

    def export_step(self, architecture: GPTArchitecture) -> int | None:
        """See WeightMapping.export_step."""
        return None if self.transposed else self.row_step(architecture)

    def _turn(self, shape: Shape) -> Shape:
        return shape[::-1] if self.transposed else shape

    def _read(self, folder: SafetensorsFolder, name: str, block: Block) -> Tensor:
        if not self.transposed or len(folder.shape(name)) == 1:
            return folder.read(name, block)
        columns = block[1] if len(block) > 1 else slice(None)
        return folder.read(name, (columns, block[0])).t()

    def _write(self, weight: Tensor) -> Tensor:
        return weight.t() if self.transposed else weight


class Direct(_Oriented):
    """One weight, stored alike."""

    def hf_shapes(self, shape: Shape, architecture: GPTArchitecture) -> tuple[Shape, ...]:
        """See WeightMapping.hf_shapes."""
        return (self._turn(shape),)

    def read(
        self, folder: SafetensorsFolder, hf_names: Sequence[str], block: Block, architecture: GPTArchitecture
    ) -> Tensor:
        """See WeightMapping.read."""
        return self._read(folder, hf_names[0], block)

    def export(self, part: Tensor, architecture: GPTArchitecture, first_row: int = 0) -> Iterator[Strip]:
        """See WeightMapping.export."""
        yield 0, first_row, self._write(part)


class Vocabulary:
    """One row per token, with zero rows after the last token."""

    def hf_shapes(self, shape: Shape, architecture: GPTArchitecture) -> tuple[Shape, ...]:
        """See WeightMapping.hf_shapes."""
        return ((architecture.vocab_size, *shape[1:]),)

    def row_step(self, architecture: GPTArchitecture) -> int:
        """See WeightMapping.row_step."""
        return 1

    def read(
        self, folder: SafetensorsFolder, hf_names: Sequence[str], block: Block, architecture: GPTArchitecture
    ) -> Tensor:
        """See WeightMapping.read."""
        (name,), rows = hf_names, block[0]
        vocab_size = folder.shape(name)[0]
        start, stop = (min(bound, vocab_size) for bound in (rows.start, rows.stop))
        part = folder.read(name, (slice(start, stop), *block[1:]))
        missing = (rows.stop - rows.start) - part.shape[0]
        return torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part

    def export_step(self, architecture: GPTArchitecture) -> int | None:
        """See WeightMapping.export_step."""
        return 1

    def export(self, part: Tensor, architecture: GPTArchitecture, first_row: int = 0) -> Iterator[Strip]:
        """See WeightMapping.export."""
        yield 0, first_row, part[: max(0, architecture.vocab_size - first_row)]


@dataclass(frozen=True)
class GroupedQKV(_Oriented):
    """q, k and v, three weights or one after the other in one (`fused`), stored by query group: its q heads, its k
    head, its v head.
    """

    fused: bool = False

    def hf_shapes(self, shape: Shape, architecture: GPTArchitecture) -> tuple[Shape, ...]:
        """See WeightMapping.hf_shapes."""
        sizes = [architecture.num_query_groups * rows for rows in self._rows_in_group(architecture)]
        if self.fused:
            return (self._turn((sum(sizes), *shape[1:])),)
        return tuple(self._turn((size, *shape[1:])) for size in sizes)

    def row_step(self, architecture: GPTArchitecture) -> int:
        """See WeightMapping.row_step."""
        return sum(self._rows_in_group(architecture))

    def read(
        self, folder: SafetensorsFolder, hf_names: Sequence[str], block: Block, architecture: GPTArchitecture
    ) -> Tensor:
        """See WeightMapping.read.

        Raises:
            ValueError: the block cuts a query group.
        """
        step = self.row_step(architecture)
        (first, cut), (last, cut_too) = divmod(block[0].start, step), divmod(block[0].stop, step)
        if cut or cut_too:
            raise ValueError(f"rows {block[0].start} to {block[0].stop} cut a query group of {step} rows")
        parts, offset = [], 0
        for index, rows in enumerate(self._rows_in_group(architecture)):
            # A block of consecutive groups is a block of consecutive rows in q, in k and in v.
            part = slice(offset + first * rows, offset + last * rows)
            strip = self._read(folder, hf_names[0 if self.fused else index], (part, *block[1:]))
            parts.append(strip.reshape(last - first, rows, *strip.shape[1:]))
            offset += architecture.num_query_groups * rows if self.fused else 0
        return torch.cat(parts, dim=1).flatten(0, 1)

    def export(self, part: Tensor, architecture: GPTArchitecture, first_row: int = 0) -> Iterator[Strip]:
        """See WeightMapping.export."""
        rows, step = self._rows_in_group(architecture), self.row_step(architecture)
        first, groups = first_row // step, part.reshape(-1, step, *part.shape[1:])
        strips = [strip.flatten(0, 1) for strip in torch.split(groups, rows, dim=1)]
        if self.fused and self.transposed:
            yield 0, 0, self._write(torch.cat(strips))
            return
        offset = 0
        for index, (strip, each) in enumerate(zip(strips, rows, strict=True)):
            yield 0 if self.fused else index, offset + first * each, self._write(strip)
            offset += architecture.num_query_groups * each if self.fused else 0

    @staticmethod
    def _rows_in_group(architecture: GPTArchitecture) -> list[int]:
        each = architecture.kv_channels
        return [architecture.num_attention_heads // architecture.num_query_groups * each, each, each]


class GatedMLP(_Oriented):
    """Gate and up projections [f, ...], stored as [gate; up]."""

    def hf_shapes(self, shape: Shape, architecture: GPTArchitecture) -> tuple[Shape, ...]:
        """See WeightMapping.hf_shapes."""
        half = self._turn((shape[0] // 2, *shape[1:]))
        return half, half

    def read(
        self, folder: SafetensorsFolder, hf_names: Sequence[str], block: Block, architecture: GPTArchitecture
    ) -> Tensor:
        """See WeightMapping.read."""
        half, parts = architecture.mlp_width, []
        for index, name in enumerate(hf_names):
            start, stop = (min(max(bound - index * half, 0), half) for bound in (block[0].start, block[0].stop))
            if start < stop:
                parts.append(self._read(folder, name, (slice(start, stop), *block[1:])))
        return join_blocks(parts)

    def export(self, part: Tensor, architecture: GPTArchitecture, first_row: int = 0) -> Iterator[Strip]:
        """See WeightMapping.export."""
        gate_rows = max(0, architecture.mlp_width - first_row)
        for index, rows in enumerate((part[:gate_rows], part[gate_rows:])):
            if len(rows):
                yield index, max(0, first_row - index * architecture.mlp_width), self._write(rows)
