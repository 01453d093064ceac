"""A Hugging Face folder written weight by weight: a temporary folder beside, renamed when it is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megakd.common.errors import UserError
from megakd.common.logging import log
from megakd.convert.safetensors_folder import INDEX_FILE, SINGLE_FILE

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


_OTHER_FILES = ("config.json", "generation_config.json", INDEX_FILE)


def check_can_export(out_dir: str | Path, *sources: str | Path | None) -> None:
    """Refuse to replace anything but an earlier export, and the folders that the model comes from in any case.

    Raises:
        UserError: `out_dir` is one of `sources`, a file, or a folder that holds anything an export does not write.
    """
    out_dir = Path(out_dir)
    if any(source is not None and Path(source).resolve() == out_dir.resolve() for source in sources):
        raise UserError(f"{out_dir} is where the model comes from; the export would replace it. Name another path.")
    if not out_dir.exists():
        return
    foreign = [out_dir.name] if not out_dir.is_dir() else sorted(e.name for e in out_dir.iterdir() if not _ours(e))
    if foreign:
        raise UserError(
            f"{out_dir} holds {foreign[0]}, which no export writes; the export would replace it. Name another path."
        )


def _ours(entry: Path) -> bool:
    return entry.is_file() and (
        entry.suffix == ".safetensors" or entry.name in _TOKENIZER_FILES or entry.name in _OTHER_FILES
    )


class ShardWriter:
    """Collects weights up to `max_shard_bytes`, writes them as one file, and names the files at the end."""

    def __init__(self, out_dir: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
        self._out_dir = out_dir
        self._dtype = dtype
        self._max_shard_bytes = max_shard_bytes
        self._folder = out_dir.with_name(f".{out_dir.name}.tmp")
        if self._folder.exists():
            shutil.rmtree(self._folder)
        self._folder.mkdir(parents=True)
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._files: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, weight: Tensor) -> None:
        """Take a weight; it is copied to host memory."""
        # A copy of its own: safetensors refuses tensors that share storage, and this one is a view of a parameter.
        copy = torch.empty(weight.shape, dtype=self._dtype).copy_(weight)
        size = copy.numel() * copy.element_size()
        if self._pending and self._pending_bytes + size > self._max_shard_bytes:
            self._flush()
        self._pending[name] = copy
        self._pending_bytes += size
        self._total_bytes += size

    def finish(self, config: Mapping[str, Any], tokenizer_from: Path | None, source_config_dir: Path | None) -> None:
        """Write what is left, the index, config.json, generation_config.json and tokenizer files; then rename."""
        self._flush()
        self._name_files()
        _write_json(self._folder / "config.json", config)
        self._write_generation_config(config, source_config_dir)
        if tokenizer_from is not None:
            self._copy_tokenizer(tokenizer_from)
        old = self._out_dir.with_name(f".{self._out_dir.name}.old")
        if old.exists():
            shutil.rmtree(old)
        if self._out_dir.exists():
            self._out_dir.rename(old)
        self._folder.rename(self._out_dir)
        shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Remove what has been written."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _flush(self) -> None:
        if self._pending:
            # transformers 4 refuses a file whose metadata does not say which library wrote it.
            save_file(self._pending, self._folder / _part(len(self._files)), metadata={"format": "pt"})
            self._files.append(list(self._pending))
            self._pending, self._pending_bytes = {}, 0

    def _name_files(self) -> None:
        count = len(self._files)
        if count == 1:
            (self._folder / _part(0)).rename(self._folder / SINGLE_FILE)
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._files):
            final = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            (self._folder / _part(index)).rename(self._folder / final)
            weight_map.update(dict.fromkeys(names, final))
        metadata = {"total_size": self._total_bytes}
        _write_json(self._folder / INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})

    def _copy_tokenizer(self, tokenizer_from: Path) -> None:
        present = [file for file in _TOKENIZER_FILES if (tokenizer_from / file).is_file()]
        for file in present:
            shutil.copyfile(tokenizer_from / file, self._folder / file)
        if not present:
            log.warning(f"{tokenizer_from} has no tokenizer files; {self._out_dir} is written without.")

    def _write_generation_config(self, config: Mapping[str, Any], source_config_dir: Path | None) -> None:
        target = self._folder / "generation_config.json"
        if source_config_dir is not None and (source_config_dir / target.name).is_file():
            shutil.copyfile(source_config_dir / target.name, target)
            return
        tokens = {key: config[key] for key in config if key.endswith("_token_id") and config[key] is not None}
        _write_json(target, {"_from_model_config": True} | tokens)


def _part(index: int) -> str:
    return f"part-{index:05d}.safetensors"


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
