"""Every family's logits against transformers, under every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megakd.convert import architecture_from_hf, check_weights
from tests.convert.family_models import MODELS, save_model
from tests.models.forward import full_logits

# tensor ranks, stages, sequence parallelism
LAYOUTS = [(1, 1, False), (2, 1, True), (1, 2, False), (2, 2, False)]


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    model = save_model(tmp_path, name)
    architecture = architecture_from_hf(tmp_path)
    check_weights(tmp_path, architecture)
    tokens = torch.randint(131, (3, 48), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(tokens).logits
    assert expected.std() > 0.1
    for layout in LAYOUTS:
        for logits in run_ranks(layout[0] * layout[1], _run, architecture, str(tmp_path), tokens, *layout):
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def _run(architecture: Any, path: str, tokens: torch.Tensor, tp: int, pp: int, sequence_parallel: bool) -> torch.Tensor:
    return full_logits(architecture, path, tokens, tp=tp, pp=pp, sequence_parallel=sequence_parallel)
