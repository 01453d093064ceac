"""Teacher and student from Megatron checkpoints: the same run as from the Hugging Face folders they came from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megakd.common.errors import UserError
from megakd.config.schema import Config
from megakd.convert.importing import import_checkpoint
from megakd.convert.output_folder import TOKENIZER_FILES
from megakd.data.preprocess import write_documents
from megakd.data.tokenizer import load_tokenizer
from megakd.training.preflight import preflight
from tests.training.runs import build, layout, run_values, write_run_files

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart" / "teacher"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run_files(tmp_path_factory.mktemp("run"))
    for model in ("student", "teacher"):
        import_checkpoint(folder / model, folder / f"{model}-megatron")
    return folder


def paths(folder: Path, kind: str, layers: list[int] | None = None) -> dict[str, Any]:
    init = {"path": str(folder / f"student{kind}")} | ({} if layers is None else {"layers": layers})
    return {"teacher__path": str(folder / f"teacher{kind}"), "student__init": init}


def losses(values: dict[str, Any]) -> list[float]:
    return build(values).train(0, 2)


@pytest.mark.parametrize("layers", [None, [3, 0]], ids=["whole", "pruned"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_the_same_losses(
    folder: Path, tp: int, pp: int, layers: list[int] | None, run_ranks: Callable[..., list[Any]]
) -> None:
    values = [run_values(folder, **layout(tp, pp), **paths(folder, kind, layers)) for kind in ("", "-megatron")]
    for one in values:
        preflight(Config.model_validate(one), tp * pp)
    expected, found = (run_ranks(tp * pp, losses, one) for one in values)
    assert found == expected
    assert found[-1][0] > 0


def distil(values: dict[str, Any]) -> None:
    from megakd.training.loop import distill

    distill(Config.model_validate(values))


def test_a_whole_run_exports_a_hugging_face_folder(
    folder: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    settings = paths(folder, "-megatron") | {"schedule__train_steps": 1, "run__output_dir": str(tmp_path / "run")}
    run_ranks(1, distil, run_values(folder, **settings))
    written = json.loads((tmp_path / "run" / "student" / "config.json").read_text())
    assert written["model_type"] == "llama"


def test_the_tokenizer_beside_a_checkpoint_is_held_against_the_data(
    folder: Path, tmp_path: Path, log_messages: list[str]
) -> None:
    import_checkpoint(QUICKSTART, tmp_path / "teacher")
    write_documents(["def f(x): return x\n" * 50], tmp_path / "text", load_tokenizer(QUICKSTART))
    settings = {"teacher__path": str(tmp_path / "teacher"), "student__init": {"path": str(tmp_path / "teacher")}}
    values = run_values(folder, **settings, data__train=str(tmp_path / "text"))
    preflight(Config.model_validate(values), 1)
    assert log_messages == []
    for file in TOKENIZER_FILES:
        (tmp_path / "teacher" / file).unlink(missing_ok=True)
    preflight(Config.model_validate(values), 1)
    assert any("teacher holds no tokenizer files" in message for message in log_messages)


def test_what_is_wrong_with_a_checkpoint_is_told_before_a_rank_starts(folder: Path, tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            preflight(Config.model_validate(run_values(folder, teacher__path=str(path))), 1)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    teacher = tmp_path / "teacher"
    import_checkpoint(folder / "teacher", teacher)
    assert "or a Megatron checkpoint with config.json beside it" in message(teacher / "release")
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"intermediate_size": 56}))
    assert "linear_fc1.weight in" in message(teacher) and "config.json means" in message(teacher)
    (teacher / "config.json").write_text(json.dumps(config))
    (teacher / "release" / ".metadata").write_bytes(b"cos\nsystem\n.")
    assert "asks for os.system, which no checkpoint needs" in message(teacher)
    (teacher / "config.json").unlink()
    assert f"{teacher} has no config.json. Give a local Hugging Face folder, or a Megatron" in message(teacher)
