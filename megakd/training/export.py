"""The student out of the run: gathered from the ranks into a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel

from megakd.config.schema import Config
from megakd.convert import export_hf
from megakd.models.parameters import canonical_parameters
from megakd.training.architectures import exported_folder, source_folder
from megakd.training.build import DTYPES, Student


@contextmanager
def parameters_gathered(model: DistributedDataParallel) -> Iterator[None]:
    """Wait until every rank holds the parameters of the last step; overlapped gathering leaves some on their way."""
    overlapped = model.ddp_config.overlap_param_gather and model.ddp_config.use_distributed_optimizer
    if overlapped:
        model.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        if overlapped:
            model.enable_forward_pre_hook()


def export_student(config: Config, student: Student) -> Path:
    """Write the student as `transformers` loads it, with the tokenizer of the model it comes from. Collective."""
    folder, source, mesh = exported_folder(config), source_folder(config), student.mesh
    with parameters_gathered(student.model):
        export_hf(
            canonical_parameters(student.model),
            folder,
            student.architecture,
            tp_group=mesh.groups.tp,
            pp_group=mesh.groups.pp,
            is_data_rank_0=mesh.dp_rank == 0,
            tokenizer_from=source,
            source_config_dir=source,
            dtype=DTYPES[config.run.dtype],
        )
    return folder
