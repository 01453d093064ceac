"""A megatron-core distributed checkpoint into a Hugging Face folder, parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megakd.config.architecture import GPTArchitecture
from megakd.convert.hf_config import read_hf_config
from megakd.convert.hf_config_writing import family_for_export, hf_config_from_architecture
from megakd.convert.importing import Progress, blocks_of
from megakd.convert.megatron_weights import MegatronWeights
from megakd.convert.output_folder import OutputFolder, write_errors_told
from megakd.convert.shard_writer import EXPORTED, ShardWriter, Weight
from megakd.convert.source import dtype_word, most_used, to_dtype
from megakd.convert.table import Family
from megakd.parameters.shapes import parameter_shapes
from megakd.parameters.sharding import Block

MAX_SHARD_BYTES = 5_000_000_000


def export_checkpoint(
    megatron: str | Path,
    out: str | Path,
    *,
    config_dir: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    begin: Callable[[int], Progress] = lambda total: lambda done: None,
) -> None:
    """Convert a distributed checkpoint, from any layout, to a folder that `transformers` loads.

    Args:
        config_dir: folder with the model's config.json and tokenizer, where the checkpoint has none beside it.
        dtype: type of the weights written; None keeps each as it is.
        overwrite: replace an earlier export in `out`.
        begin: as in `import_checkpoint`.

    Raises:
        UserError: the checkpoint is not a model that can be read, or `out` exists or cannot be written. `out` is then
            as it was.
    """
    with write_errors_told(out):
        folder = OutputFolder(out, EXPORTED, megatron, config_dir, overwrite=overwrite)
    with folder, MegatronWeights(megatron, config_dir) as source:
        architecture = source.architecture
        source.check(architecture)
        config_source = read_hf_config(source.config_dir)
        family = family_for_export(architecture, config_source)
        types = {name: dtype or source.dtype(name) for name in parameter_shapes(architecture, 1)}
        weights = [
            Weight(hf_name, shape, types[name])
            for name, full in parameter_shapes(architecture, divisible_by=1).items()
            for hf_name, shape in family.hf_shapes(name, full, architecture).items()
        ]
        total = sum(weight.nbytes for weight in weights)
        folder.check_space(total, len(weights), source.config_dir)
        word = dtype_word(most_used((weight.dtype, weight.nbytes) for weight in weights))
        config = hf_config_from_architecture(architecture, config_source, word)
        done = begin(total)
        with write_errors_told(out):
            writer = ShardWriter(folder, weights, max_shard_bytes)
            try:
                for name, shape in parameter_shapes(architecture, divisible_by=1).items():
                    for block in _blocks(family, name, shape, source):
                        part = to_dtype(source.read(name, block), types[name], source.origin(name))
                        _write(writer, family, name, block, part, architecture)
                        done(part.numel() * types[name].itemsize)
                writer.finish(config, source.config_dir, source.config_dir)
            finally:
                writer.discard()


def _blocks(family: Family, name: str, shape: tuple[int, ...], source: MegatronWeights) -> list[Block]:
    step = family.row_of(name).mapping.export_step(source.architecture)
    return [(slice(0, shape[0]),)] if step is None else list(blocks_of(shape, step, source.dtype(name)))


def _write(
    writer: ShardWriter, family: Family, name: str, block: Block, part: Tensor, architecture: GPTArchitecture
) -> None:
    for hf_name, first_row, rows in family.export(name, part, architecture, block[0].start):
        writer.add(hf_name, rows, first_row)
