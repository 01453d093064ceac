"""A Hugging Face folder's weights as megatron-core's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megakd.common.errors import UserError, nearest
from megakd.config.architecture import GPTArchitecture
from megakd.convert.families import family_of_config
from megakd.convert.hf_config import architecture_from_hf, read_hf_config
from megakd.convert.mappings import Shape
from megakd.convert.safetensors_folder import DTYPES, SafetensorsFolder
from megakd.convert.source import row_blocks, show_shape, source_name, stored_name
from megakd.convert.table import Row
from megakd.parameters.shapes import OUTPUT_LAYER, WORD_EMBEDDINGS, parameter_shapes
from megakd.parameters.sharding import Block

_TIED_HINT = " Set tie_word_embeddings to true in config.json if the head is the embedding."


class HFWeights:
    """See WeightSource. Files are mapped, and only the slices asked for are read.

    Raises:
        UserError: the folder is missing or damaged, its family has no table, or its weights are pickled.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.architecture = architecture_from_hf(path)
        self.family = family_of_config(read_hf_config(path), self.path / "config.json")
        self.folder = SafetensorsFolder(path, self.family.base_prefix)

    def __enter__(self) -> HFWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.folder.__exit__(kind, error, trace)

    def read(self, name: str, block: Block) -> Tensor:
        """See WeightSource.read."""
        row, hf_names = self._row(name)
        return row.mapping.read(self.folder, hf_names, block, self.architecture)

    def dtype(self, name: str) -> torch.dtype:
        """See WeightSource.dtype; where its weights differ, the type that holds them all."""
        return reduce(torch.promote_types, self.dtypes(name).values())

    def dtypes(self, name: str) -> dict[str, torch.dtype]:
        """Types of the weights that a parameter is made of, by their names."""
        return {hf_name: DTYPES[self.folder.dtype(hf_name)] for hf_name in self._row(name)[1]}

    def row_step(self, name: str) -> int:
        """Blocks of a parameter start and end at multiples of this many rows."""
        return self._row(name)[0].mapping.row_step(self.architecture)

    def origin(self, name: str) -> str:
        """See WeightSource.origin."""
        return ", ".join(self._row(name)[1])

    def check(self, architecture: GPTArchitecture, layer_map: Sequence[int] | None = None) -> None:
        """See WeightSource.check."""
        present = set(self.folder.names)
        for name, shape in self._expected(architecture, layer_map).items():
            if name not in present:
                hint = _TIED_HINT if name in self._head_names() else nearest(name, present)
                raise UserError(f"{self.path} has no weight {name}, of shape {show_shape(shape)}.{hint}")
            if self.folder.shape(name) != shape:
                raise UserError(
                    f"{name} in {self.path} has the shape {show_shape(self.folder.shape(name))}; config.json means "
                    f"{show_shape(shape)}."
                )
            if self.folder.dtype(name) not in DTYPES:
                raise UserError(
                    f"{name} in {self.path} is stored as {self.folder.dtype(name)}; it must be {', '.join(DTYPES)}."
                )
        known = set(self._expected(self.architecture, None))
        if self.architecture.share_embeddings_and_output_weights:
            known.update(self._head_names())
        for name in sorted(present - known):
            if not self.family.ignores(name):
                raise UserError(
                    f"{self.path} has the weight {name}, which a {self.family.model_type} model of its config.json "
                    f"does not.{nearest(name, known)}"
                )
        self._check_tied_head(present)

    def _head_names(self) -> tuple[str, ...]:
        return self.family.row_of(OUTPUT_LAYER).hf_names(OUTPUT_LAYER)

    def _check_tied_head(self, present: set[str]) -> None:
        (head,) = self._head_names()
        if head not in present or not self.architecture.share_embeddings_and_output_weights:
            return
        (embedding,) = self._row(WORD_EMBEDDINGS)[1]
        if self.folder.shape(head) == self.folder.shape(embedding):
            rows = row_blocks(self.folder.shape(head))
            if all(torch.equal(self.folder.read(head, block), self.folder.read(embedding, block)) for block in rows):
                return
        raise UserError(
            f"{head} in {self.path} differs from {embedding}, and config.json says tie_word_embeddings true, with "
            f"which the head is not used. Set it to false to use the head, or remove {head}."
        )

    def _row(self, name: str) -> tuple[Row, tuple[str, ...]]:
        name = stored_name(name, self.architecture)
        row = self.family.row_of(name)
        return row, row.hf_names(name)

    def _expected(self, architecture: GPTArchitecture, layer_map: Sequence[int] | None) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {}
        for name, full in parameter_shapes(architecture, divisible_by=1).items():
            shapes.update(self.family.hf_shapes(source_name(name, layer_map), full, architecture))
        return shapes
