"""How a run starts: over, from a checkpoint that fits, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megakd.common.errors import UserError
from tests.training.runs import build, layout, run_values, save_llama, write_run_files


def distil(values: dict[str, Any]) -> list[int]:
    from megakd.checkpoint.folders import checkpoint_steps
    from megakd.config.schema import Config
    from megakd.training.loop import distill

    result = distill(Config.model_validate(values), accept_changes=True)
    return list(checkpoint_steps(result.folder / "checkpoints"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run_files(tmp_path)


def test_starting_over_sets_an_earlier_runs_checkpoints_aside(
    folder: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    assert run_ranks(1, distil, run_values(folder, schedule__train_steps=3)) == [[3]]
    again = run_values(folder, schedule__train_steps=1, checkpoint__resume=False)
    assert run_ranks(1, distil, again) == [[1]]
    assert (folder / "run" / "checkpoints.old-1" / "step-00000003").is_dir()


def test_a_checkpoint_beyond_the_end_of_the_run_is_refused(folder: Path, run_ranks: Callable[..., list[Any]]) -> None:
    run_ranks(1, distil, run_values(folder, schedule__train_steps=3))
    with pytest.raises(UserError, match="step 3, and this run ends at step 2"):
        run_ranks(1, distil, run_values(folder, schedule__train_steps=2))


def test_a_checkpoint_of_another_shape_names_the_parameter(folder: Path, run_ranks: Callable[..., list[Any]]) -> None:
    run_ranks(1, distil, run_values(folder, schedule__train_steps=1))
    save_llama(folder / "wider", seed=1, hidden_size=64)
    wider = run_values(folder, schedule__train_steps=2, student__init={"path": str(folder / "wider")})
    with pytest.raises(UserError, match=r"step-00000001 does not fit this model .*linear_qkv|embedding") as caught:
        run_ranks(1, distil, wider)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("world_size", [1, 2])
def test_python_refuses_what_the_command_line_refuses(
    world_size: int, folder: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    (folder / "run" / "student").mkdir(parents=True)
    (folder / "run" / "student" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        run_ranks(world_size, distil, run_values(folder))


def dtypes(values: dict[str, Any]) -> tuple[set[torch.dtype], list[float]]:
    run = build(values)
    return {parameter.dtype for parameter in run.student.model.parameters()}, run.train(0, 2)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_learned_positions_are_in_the_models_dtype(
    tp: int, pp: int, folder: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    architecture = {
        "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "vocab_size": 300,
        "max_position_embeddings": 64, "position_embedding_type": "learned_absolute", "normalization": "LayerNorm",
        "activation": "gelu", "add_bias_linear": True,
    }  # fmt: skip
    values = run_values(folder, **layout(tp, pp), run__dtype="bf16")
    values["student"] = {"architecture": architecture}
    for found, losses in run_ranks(tp * pp, dtypes, values):
        assert found == {torch.bfloat16}
        assert all(loss > 0 for loss in losses)
