"""A Hugging Face folder written weight by weight, straight to its place in its file."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megakd.common.piecewise_file import PiecewiseFile
from megakd.convert.earlier_output import OutputKind, check_apart
from megakd.convert.mappings import Shape
from megakd.convert.output_folder import TOKENIZER_FILES, OutputFolder
from megakd.convert.safetensors_folder import DTYPES, INDEX_FILE, SINGLE_FILE

# Where weights begin: memory is copied several times faster to whole cache lines, here of whole pages.
_ALIGNMENT = 4096
_WORDS = {dtype: word for word, dtype in DTYPES.items()}


EXPORTED = OutputKind(
    "export",
    frozenset({"config.json", "generation_config.json", SINGLE_FILE, "model-*-of-*.safetensors", INDEX_FILE})
    | frozenset(TOKENIZER_FILES),
    (("config.json",), (SINGLE_FILE, INDEX_FILE)),
)


def check_can_export(out_dir: str | Path, *sources: str | Path | None) -> None:
    """Refuse to replace anything but an earlier export, or to write in, over or around what the model comes from.

    Raises:
        UserError: `out_dir` is a file, a folder that no export wrote, or not apart from `sources`.
    """
    check_apart(out_dir, *sources)
    EXPORTED.check(out_dir, overwrite=True)


@dataclass(frozen=True)
class Weight:
    """A weight to be written."""

    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """Writes the announced weights, in any order and by rows, into files of at most `max_shard_bytes`.

    A weight larger than that has a file of its own. Nothing but what is handed in is held in memory. Where not even
    the files can be made, the folder is discarded.
    """

    def __init__(self, folder: OutputFolder, weights: Sequence[Weight], max_shard_bytes: int) -> None:
        self.folder = folder
        self._weights = {weight.name: weight for weight in weights}
        self._place: dict[str, tuple[PiecewiseFile, int]] = {}
        self._missing = {weight.name: weight.nbytes for weight in weights}
        self._files: list[PiecewiseFile] = []
        try:
            self._open_all(_shards(weights, max_shard_bytes))
        except BaseException:
            self.discard()
            raise

    def add(self, name: str, rows: Tensor, first_row: int = 0) -> None:
        """Write rows of a weight, in its announced type."""
        weight = self._weights[name]
        file, start = self._place[name]
        part = rows.to(device="cpu", dtype=weight.dtype).contiguous()
        assert part.shape[1:] == weight.shape[1:], (name, part.shape, weight.shape)
        row_bytes = weight.nbytes // max(1, weight.shape[0])
        file.seek(start + first_row * row_bytes)
        file.write(part.view(-1).view(torch.uint8).numpy().data)
        self._missing[name] -= part.nbytes

    def finish(self, config: Mapping[str, Any], tokenizer_from: Path | None, source_config_dir: Path | None) -> None:
        """Write config.json, generation_config.json and tokenizer files; then the folder gets its name."""
        missing = [name for name, left in self._missing.items() if left]
        assert not missing, missing
        for file in self._files:
            file.close()
        self.folder.write_json("config.json", config)
        self._write_generation_config(config, source_config_dir)
        if tokenizer_from is not None:
            self.folder.copy_tokenizer(tokenizer_from)
        self.folder.publish()

    def discard(self) -> None:
        """Remove what has been written, unless it is finished."""
        for file in self._files:
            file.close()
        self.folder.discard()

    def _open_all(self, shards: list[list[Weight]]) -> None:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        if len(shards) == 1:
            names = [SINGLE_FILE]
        else:
            total = {"total_size": sum(weight.nbytes for weight in self._weights.values())}
            holder = {weight.name: file for file, shard in zip(names, shards, strict=True) for weight in shard}
            self.folder.write_json(INDEX_FILE, {"metadata": total, "weight_map": holder})
        for name, shard in zip(names, shards, strict=True):
            self._open(name, shard)

    def _open(self, name: str, shard: Sequence[Weight]) -> None:
        header: dict[str, Any] = {
            # transformers 4 refuses a file whose metadata does not say which library wrote it.
            "__metadata__": {"format": "pt"}
        }
        end = 0
        # The wider types first, so that every weight starts at a multiple of its element.
        for weight in sorted(shard, key=lambda weight: -weight.dtype.itemsize):
            offsets = [end, end + weight.nbytes]
            header[weight.name] = {
                "dtype": _WORDS[weight.dtype],
                "shape": list(weight.shape),
                "data_offsets": offsets,
            }
            end = offsets[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        file = PiecewiseFile(self.folder.path / name)
        self._files.append(file)
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for weight in shard:
            self._place[weight.name] = (file, 8 + len(text) + header[weight.name]["data_offsets"][0])

    def _write_generation_config(self, config: Mapping[str, Any], source_config_dir: Path | None) -> None:
        name = "generation_config.json"
        if source_config_dir is not None and (source_config_dir / name).is_file():
            shutil.copyfile(source_config_dir / name, self.folder.path / name)
            return
        tokens = {key: config[key] for key in config if key.endswith("_token_id") and config[key] is not None}
        self.folder.write_json(name, {"_from_model_config": True} | tokens)


def _shards(weights: Sequence[Weight], max_shard_bytes: int) -> list[list[Weight]]:
    """The weights in their order, file by file."""
    shards: list[list[Weight]] = [[]]
    size = 0
    for weight in weights:
        if shards[-1] and size + weight.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(weight)
        size += weight.nbytes
    return shards
