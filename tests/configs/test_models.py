"""The shapes in configs/models are those of the published models."""

from __future__ import annotations

import pytest

from megakd.convert.hf_config import architecture_from_hf
from megakd.parameters.shapes import num_parameters
from tests.configs.examples import MODELS, meta_model

# Billions of parameters, as the models' pages give them.
PUBLISHED = {
    "Llama-3.1-8B": 8.03,
    "Llama-3.1-70B": 70.55,
    "Llama-3.2-1B": 1.24,
    "Llama-3.2-3B": 3.21,
    "Qwen2.5-0.5B": 0.49,
    "Qwen2.5-1.5B": 1.54,
    "Qwen2.5-7B": 7.62,
}


def test_every_shape_has_a_published_size() -> None:
    assert {folder.name for folder in MODELS.iterdir()} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_published(name: str) -> None:
    counted = sum(parameter.numel() for parameter in meta_model(MODELS / name).parameters())
    assert round(counted / 1e9, 2) == PUBLISHED[name]
    assert num_parameters(architecture_from_hf(MODELS / name)) == counted
