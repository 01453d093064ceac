"""A model spread over tensor and pipeline ranks, written as a Hugging Face folder parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.common.errors import UserError
from megakd.config.architecture import GPTArchitecture
from megakd.convert.hf_config import read_hf_config
from megakd.convert.hf_config_writing import family_for_export, hf_config_from_architecture
from megakd.convert.output_folder import OutputFolder
from megakd.convert.shard_writer import EXPORTED, ShardWriter, Weight
from megakd.convert.table import Family
from megakd.parameters.shapes import OUTPUT_LAYER, parameter_shapes
from megakd.parameters.sharding import Partition, join_shards, joined_shape, shard_of

Group = dist.ProcessGroup | None


@dataclass(frozen=True)
class _Gatherer:
    """Brings parameters to the first tensor rank of the first stage, one at a time; every rank takes part."""

    parameters: Mapping[str, Tensor]
    architecture: GPTArchitecture
    tp_group: Group
    pp_group: Group
    dtype: torch.dtype
    """Type they travel in."""

    def gather(self, name: str, stage: int, shard_shape: tuple[int, ...]) -> Tensor | None:
        """The full (padded) parameter that `stage` holds, on the writing rank; None elsewhere."""
        pp_rank, tp_rank = _rank(self.pp_group), _rank(self.tp_group)
        full = self._join(name) if pp_rank == stage else None
        if tp_rank != 0:
            return None
        if stage == 0:
            return full
        assert self.pp_group is not None
        if full is not None:
            dist.send(full.contiguous(), dist.get_global_rank(self.pp_group, 0), group=self.pp_group)
        elif pp_rank == 0:
            shape = joined_shape(shard_shape, shard_of(name, self.architecture), _size(self.tp_group))
            # Every stage has parameters, and the first always some: they tell which device the group works on.
            device = next(iter(self.parameters.values())).device
            received = torch.empty(shape, dtype=self.dtype, device=device)
            dist.recv(received, dist.get_global_rank(self.pp_group, stage), group=self.pp_group)
            return received
        return None

    def _join(self, name: str) -> Tensor:
        partition = shard_of(name, self.architecture)
        shard = self.parameters[name].detach().to(self.dtype).contiguous()
        if self.tp_group is None or self.tp_group.size() == 1 or partition is Partition.REPLICATED:
            return shard
        shards = [torch.empty_like(shard) for _ in range(self.tp_group.size())]
        dist.all_gather(shards, shard, group=self.tp_group)
        return join_shards(shards, partition)


def export_hf(
    parameters: Mapping[str, Tensor],
    out_dir: str | Path,
    architecture: GPTArchitecture,
    *,
    tp_group: Group = None,
    pp_group: Group = None,
    is_data_rank_0: bool = True,
    dtype: torch.dtype,
    tokenizer_from: str | Path | None = None,
    source_config_dir: str | Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model as `transformers` loads it; collective over the tensor and pipeline ranks of a replica.

    The first tensor rank of the first stage of the first data-parallel replica writes; no rank holds more than one
    full parameter. An earlier model in `out_dir` is replaced when the new one is whole.

    Args:
        parameters: canonical name to this rank's shard.
        tp_group, pp_group: this rank's groups; None for one rank.
        is_data_rank_0: other replicas return at once.
        dtype: type of the weights written.
        tokenizer_from: folder whose tokenizer files are copied.
        source_config_dir: Hugging Face folder the model descends from, for generation_config.json and what its
            config.json says beside the architecture.

    Raises:
        UserError: no Hugging Face family expresses the architecture, `out_dir` cannot be written, or a parameter is
            missing; on all tensor and pipeline ranks alike.
    """
    if not is_data_rank_0:
        return
    source = None if source_config_dir is None else read_hf_config(source_config_dir)
    family = family_for_export(architecture, source)
    config = hf_config_from_architecture(architecture, source, str(dtype).removeprefix("torch."))
    gatherer = _Gatherer(parameters, architecture, tp_group, pp_group, dtype)
    attempt = _Attempt(f"The model could not be written to {out_dir}")
    writer: ShardWriter | None = None

    def open_writer() -> None:
        nonlocal writer
        weights = [
            Weight(hf_name, shape, dtype)
            for name, full in parameter_shapes(architecture, divisible_by=1).items()
            for hf_name, shape in family.hf_shapes(name, full, architecture).items()
        ]
        folder = OutputFolder(out_dir, EXPORTED, tokenizer_from, source_config_dir, overwrite=True)
        writer = ShardWriter(folder, weights, max_shard_bytes)

    if _rank(tp_group) == 0 and _rank(pp_group) == 0:
        attempt.run(open_writer)
    attempt.agree(tp_group, pp_group)
    try:
        for name, (stage, shard_shape) in _holders(parameters, architecture, pp_group).items():
            full = gatherer.gather(name, stage, shard_shape)
            if full is not None and writer is not None:
                attempt.run(partial(_write, writer, family, name, full, architecture))
        if writer is not None:
            attempt.run(partial(writer.finish, config, _path(tokenizer_from), _path(source_config_dir)))
        attempt.agree(tp_group, pp_group)
    finally:
        if writer is not None:
            writer.discard()


def _write(writer: ShardWriter, family: Family, name: str, full: Tensor, architecture: GPTArchitecture) -> None:
    for hf_name, first_row, rows in family.export(name, full, architecture):
        writer.add(hf_name, rows, first_row)


class _Attempt:
    """Writes that may fail on one rank only: it goes on meeting the others, and all raise together at the end."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._problem: str | None = None

    def run(self, action: Callable[[], None]) -> None:
        """Do it, unless something failed before."""
        if self._problem is not None:
            return
        try:
            action()
        except UserError as error:
            self._problem = str(error)
        except OSError as error:
            self._problem = f"{self._what}: {error}."

    def agree(self, tp_group: Group, pp_group: Group) -> None:
        """Tell all ranks of the model what the writing one met.

        Raises:
            UserError: something failed.
        """
        told = [self._problem]
        # Only the first tensor rank's pipeline knows after the first broadcast; its tensor groups reach the rest.
        for group in (pp_group, tp_group):
            if group is not None and group.size() > 1:
                dist.broadcast_object_list(told, src=dist.get_global_rank(group, 0), group=group)
        if told[0] is not None:
            raise UserError(told[0])


def _holders(
    parameters: Mapping[str, Tensor], architecture: GPTArchitecture, pp_group: Group
) -> dict[str, tuple[int, tuple[int, ...]]]:
    """For each parameter, in the model's order: its pipeline stage and its shard's shape there."""
    mine = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    stages: list[dict[str, tuple[int, ...]]] = [mine]
    if pp_group is not None and pp_group.size() > 1:
        stages = [{} for _ in range(pp_group.size())]
        dist.all_gather_object(stages, mine, group=pp_group)
    held = {name: (stage, shape) for stage, names in enumerate(stages) for name, shape in names.items()}
    if architecture.share_embeddings_and_output_weights:
        held.pop(OUTPUT_LAYER, None)
    wanted = parameter_shapes(architecture, divisible_by=1)
    for name in sorted(held.keys() ^ wanted.keys()):
        raise UserError(f"{name} is {'not' if name in wanted else 'unexpectedly'} among the parameters to export.")
    return {name: held[name] for name in wanted}


def _rank(group: Group) -> int:
    return 0 if group is None else group.rank()


def _size(group: Group) -> int:
    return 1 if group is None else group.size()


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)
