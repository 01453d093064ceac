"""Configurations for the tests of this folder."""

from __future__ import annotations

import copy
from typing import Any

from megakd.config.load import config_from_dict
from megakd.config.schema import Config

ARCHITECTURE: dict[str, Any] = {
    "num_layers": 6,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "vocab_size": 250,
    "max_position_embeddings": 64,
}

VALID: dict[str, Any] = {
    "run": {"output_dir": "runs/x"},
    "student": {"init": {"path": "models/teacher"}},
    "teacher": {"path": "models/teacher"},
    "data": {"train": "data/train", "sequence_length": 32, "micro_batch_size": 2, "global_batch_size": 16},
    "optimizer": {"lr": 0.001},
    "schedule": {"train_steps": 10},
}


def values(**changes: Any) -> dict[str, Any]:
    """VALID with `section__key=value` on top; `section=value` replaces a whole section."""
    result = copy.deepcopy(VALID)
    for path, value in changes.items():
        section, _, key = path.partition("__")
        if key:
            result.setdefault(section, {})[key] = value
        else:
            result[section] = value
    return result


def config(**changes: Any) -> Config:
    """The Config of `values`."""
    return config_from_dict(values(**changes))
