"""A megatron-core distributed checkpoint's weights, by canonical name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megakd.common.errors import UserError, nearest
from megakd.config.architecture import GPTArchitecture
from megakd.convert.checkpoint_keys import stacked_key, stacked_sizes
from megakd.convert.hf_config import architecture_from_hf
from megakd.convert.source import row_blocks, show_shape, source_name, stored_name
from megakd.parameters.shapes import OUTPUT_LAYER, WORD_EMBEDDINGS, parameter_shapes
from megakd.parameters.sharding import Block, layer_of
from megakd.torch_dist import TorchDistFolder, checkpoint_folder

_VOCABULARY = (WORD_EMBEDDINGS, OUTPUT_LAYER)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Beside the model: optimizers of training checkpoints.
_NOT_THE_MODEL = ("optimizer.", "chained_")


class MegatronWeights:
    """See WeightSource.

    Args:
        path: a folder in Megatron-LM's layout, or the one inside it that holds the tensors.
        config_dir: folder with the model's config.json in Hugging Face's words; `path` where not given.

    Raises:
        UserError: there is no checkpoint, it is damaged, or there is no config.json that says what it is.
    """

    def __init__(self, path: str | Path, config_dir: str | Path | None = None) -> None:
        self.path = Path(path)
        folder = checkpoint_folder(path)
        if folder is None:
            raise UserError(f"{path} holds no checkpoint in torch_dist format.")
        self.config_dir = Path(path if config_dir is None else config_dir)
        if not (self.config_dir / "config.json").is_file() and (folder.parent / "config.json").is_file():
            self.config_dir = folder.parent
        if config_dir is None and not (self.config_dir / "config.json").is_file():
            raise UserError(
                f"{path} has no config.json, which says what model it is. Copy the model's there, or for an export "
                "name its folder with --hf-config."
            )
        self.architecture = architecture_from_hf(self.config_dir)
        self.folder = TorchDistFolder(folder)
        self._keys = set(self.folder.keys)

    def __enter__(self) -> MegatronWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Files are open only while they are read."""

    def read(self, name: str, block: Block) -> Tensor:
        """See WeightSource.read."""
        key, place = self._place(name)
        shape = self.folder.shape(key)[len(place) :]
        bounds = [(part.start, part.stop) for part in block] + [(0, size) for size in shape[len(block) :]]
        # Rows beyond the vocabulary are zero, however many the checkpoint has.
        stored = self.architecture.vocab_size if name in _VOCABULARY else shape[0]
        inside = [
            (min(start, size), min(stop, size))
            for (start, stop), size in zip(bounds, (stored, *shape[1:]), strict=True)
        ]
        offsets = tuple(start for start, _ in inside)
        sizes = tuple(stop - start for start, stop in inside)
        part = self.folder.read(key, (*place, *offsets), (*(1 for _ in place), *sizes)).reshape(sizes)
        missing = bounds[0][1] - bounds[0][0] - sizes[0] if name in _VOCABULARY else 0
        return torch.cat([part, part.new_zeros(missing, *sizes[1:])]) if missing else part

    def dtype(self, name: str) -> torch.dtype:
        """See WeightSource.dtype."""
        return self.folder.dtype(self._place(name)[0])

    def origin(self, name: str) -> str:
        """See WeightSource.origin."""
        return self._place(name)[0]

    def check(self, architecture: GPTArchitecture, layer_map: Sequence[int] | None = None) -> None:
        """See WeightSource.check."""
        for name, shape in parameter_shapes(architecture, divisible_by=1).items():
            origin = source_name(name, layer_map)
            key, place = self._place(origin)
            if key not in self._keys:
                raise UserError(
                    f"{self.path} has no tensor {key}, which the model of {self.config_dir / 'config.json'} needs."
                    f"{nearest(key, self._keys)}"
                )
            stored, found = self.folder.shape(key), self.folder.shape(key)[len(place) :]
            # Without that of the layers, where each has a key of its own.
            sizes = stacked_sizes(stacked_key(origin, self.architecture)[1], self.architecture)
            sizes = sizes[len(sizes) - len(place) :]
            padded = name in _VOCABULARY and found[:1] > shape[:1] and found[1:] == shape[1:]
            if (found != shape and not padded) or stored[: len(place)] != sizes:
                raise UserError(
                    f"{key} in {self.path} has the shape {show_shape(stored)}; config.json means "
                    f"{show_shape(sizes + shape)}."
                )
            if self.folder.dtype(key) not in _FLOATS:
                raise UserError(f"{key} in {self.path} is stored as {self.folder.dtype(key)}; it must be a float.")
        known = {self._place(name)[0] for name in parameter_shapes(self.architecture, divisible_by=1)}
        if self.architecture.share_embeddings_and_output_weights:
            known.add(OUTPUT_LAYER)
        for key in sorted(self._keys - known):
            if not key.startswith(_NOT_THE_MODEL):
                raise UserError(
                    f"{self.path} has the tensor {key}, which the model of its config.json does not."
                    f"{nearest(key, known)}"
                )
        self._check_tied_head()

    def _check_tied_head(self) -> None:
        if OUTPUT_LAYER not in self._keys or not self.architecture.share_embeddings_and_output_weights:
            return
        shape = self.folder.shape(WORD_EMBEDDINGS)
        vocabulary = (self.architecture.vocab_size, *shape[1:])
        if self.folder.shape(OUTPUT_LAYER)[1:] == shape[1:]:
            sizes = [(block[0].stop - block[0].start, shape[1]) for block in row_blocks(vocabulary)]
            starts = [(block[0].start, 0) for block in row_blocks(vocabulary)]
            if all(
                torch.equal(self.folder.read(OUTPUT_LAYER, at, size), self.folder.read(WORD_EMBEDDINGS, at, size))
                for at, size in zip(starts, sizes, strict=True)
            ):
                return
        raise UserError(
            f"{OUTPUT_LAYER} in {self.path} differs from {WORD_EMBEDDINGS}, and {self.config_dir / 'config.json'} says "
            "tie_word_embeddings true, with which the head is not used. Set it to false to use the head."
        )

    def _place(self, name: str) -> tuple[str, tuple[int, ...]]:
        """See stacked_key."""
        name = stored_name(name, self.architecture)
        # Megatron-LM writes one key per layer where layers differ, or when it is told to.
        key, place = stacked_key(name, self.architecture)
        own = key.replace("decoder.layers.", f"decoder.layers.{layer_of(name)}.", 1)
        return (own, place[1:]) if own in self._keys else (key, place)
