"""Jobs and clusters for tests of plans."""

from __future__ import annotations

from typing import Any

from megakd.config.architecture import GPTArchitecture
from megakd.config.schema import Config
from megakd.planning.clusters import Cluster
from megakd.planning.job import Job, build_job

STUDENT = {
    "num_layers": 8, "hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 8, "num_query_groups": 4,
    "vocab_size": 1024, "max_position_embeddings": 512,
}  # fmt: skip
CLUSTER = Cluster(
    name="test", ranks_per_node=4, memory_gib=80, bf16_tflops=1000, fp32_tflops=100, memory_gb_per_s=3000,
    link_gb_per_s=400, network_gb_per_s=50, price_per_gpu_hour=2.0,
)  # fmt: skip


def build_test_job(world_size: int = 1, *, device_type: str = "cpu", shape: dict[str, Any] | None = None,
                   **settings: Any) -> Job:  # fmt: skip
    """A student of `STUDENT`'s shape without a teacher; settings are `section__key=value`."""
    values: dict[str, Any] = {
        "run": {"output_dir": "runs/test"},
        "student": {"architecture": GPTArchitecture(**(STUDENT | (shape or {}))).model_dump()},
        "distill": {"kd_weight": 0.0, "ce_weight": 1.0},
        "data": {"train": "data", "sequence_length": 128, "micro_batch_size": 2, "global_batch_size": 16},
        "optimizer": {"lr": 1e-3},
        "schedule": {"train_steps": 10},
    }
    for key, value in settings.items():
        section, name = key.split("__")
        values.setdefault(section, {})[name] = value
    return build_job(Config.model_validate(values), world_size, device_type)
