"""Models in and out: Hugging Face folders and Megatron checkpoints, a table per model family."""

from megakd.convert.gathering import export_hf
from megakd.convert.hf_config import architecture_from_hf, generation_end_ids, read_hf_config
from megakd.convert.hf_config_writing import hf_config_from_architecture
from megakd.convert.loading import check_weights, load_head, load_weights
from megakd.convert.shard_writer import check_can_export

__all__ = [
    "architecture_from_hf",
    "check_can_export",
    "check_weights",
    "export_hf",
    "generation_end_ids",
    "hf_config_from_architecture",
    "load_head",
    "load_weights",
    "read_hf_config",
]
