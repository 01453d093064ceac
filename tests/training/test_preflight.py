"""Bad input is told in one line before a rank starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megakd.common.errors import UserError
from megakd.common.logging import configure_logging
from megakd.config.schema import Config
from megakd.data.fingerprint import FORMAT, VERSION
from megakd.data.preprocess import write_documents
from megakd.data.tokenizer import load_tokenizer
from megakd.training.preflight import preflight
from tests.data.example_files import write_examples
from tests.training.runs import run_values, write_run_files, write_tokens

TEACHER = Path(__file__).resolve().parents[2] / "configs" / "quickstart" / "teacher"


def error(values: dict[str, Any], world_size: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        preflight(Config.model_validate(values), world_size)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run_files(tmp_path)


def change_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_good_configuration_passes(folder: Path) -> None:
    preflight(Config.model_validate(run_values(folder)), 1)


def test_data_that_cannot_be_held_against_a_tokenizer_is_told_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging()
    values = run_values(folder)
    data = values["data"]["train"]
    preflight(Config.model_validate(values), 1)
    told = [line for line in capsys.readouterr().out.splitlines() if "not checked" in line]
    reason = f"{data}.json is missing (data written by another tool)"
    assert told == [f"data.train: not checked against the teacher's and the student's tokenizer: {reason}"]


def test_missing_teacher(folder: Path) -> None:
    assert str(folder / "nowhere") in error(run_values(folder, teacher__path=str(folder / "nowhere")))


def test_missing_weight(folder: Path) -> None:
    change_weights(folder / "teacher", lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    assert "model.layers.1.mlp.up_proj.weight" in error(run_values(folder))


def test_misshapen_weight(folder: Path) -> None:
    change_weights(folder / "student", lambda weights: weights.update({"model.norm.weight": torch.ones(31)}))
    message = error(run_values(folder))
    assert "model.norm.weight" in message and "[31]" in message and "[32]" in message


def test_missing_token_file(folder: Path) -> None:
    message = error(run_values(folder, data__train=str(folder / "other")))
    assert "data.train" in message and "preprocess_data.py" in message


def test_corpus_shorter_than_a_sample(folder: Path) -> None:
    write_tokens(folder / "short", torch.arange(10).numpy())
    message = error(run_values(folder, data__train=str(folder / "short")))
    assert "10 tokens" in message and "data.sequence_length" in message


def test_sequence_longer_than_the_model(folder: Path) -> None:
    message = error(run_values(folder, data__sequence_length=65))
    assert "data.sequence_length is 65" in message and "64" in message


@pytest.mark.parametrize(
    ("settings", "world_size", "named"),
    [
        ({"parallel__tensor_model_parallel_size": 3}, 3, "num_attention_heads"),
        ({"parallel__tensor_model_parallel_size": 4}, 4, "num_query_groups"),
        ({"parallel__pipeline_model_parallel_size": 3}, 3, "pipeline_model_parallel_size"),
        ({"parallel__tensor_model_parallel_size": 2}, 3, "3"),
        ({"data__global_batch_size": 6}, 2, "data.global_batch_size"),
    ],
)
def test_layout_that_does_not_divide(folder: Path, settings: dict[str, Any], world_size: int, named: str) -> None:
    assert named in error(run_values(folder, **settings), world_size)


def test_layer_out_of_range(folder: Path) -> None:
    init = {"path": str(folder / "student"), "layers": [0, 4]}
    message = error(run_values(folder, student__init=init))
    assert "student.init.layers names layer 4" in message and "0 to 3" in message


def test_tokenizer_that_is_not_the_teachers_names_the_first_id(folder: Path) -> None:
    write_documents(["def f(x): return x\n" * 50], folder / "text", load_tokenizer(TEACHER))
    other = folder / "other-teacher"
    other.mkdir()
    for file in TEACHER.iterdir():
        if file.name != "tokenizer.model":
            (other / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    by_id = {index: piece for piece, index in vocabulary.items()}
    first, second = by_id[3000], by_id[3001]
    vocabulary[first], vocabulary[second] = 3001, 3000
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    values = run_values(
        folder, data__train=str(folder / "text"), teacher__path=str(other), student__init={"path": str(TEACHER)}
    )
    message = error(values)
    assert "data.train" in message and "3000" in message


def test_export_folder_that_holds_something_else(folder: Path) -> None:
    (folder / "run" / "student").mkdir(parents=True)
    (folder / "run" / "student" / "thesis.tex").write_text("")
    assert "thesis.tex" in error(run_values(folder))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data__packing": True}, "data.packing is true and has no effect: data.train has no data set of examples"),
        ({"data__loss_on": "all"}, "data.loss_on is all and has no effect: data.train has no data set of examples"),
        ({"data__truncation": "keep_end"}, "data.truncation is keep_end and has no effect"),
        (
            {"data__reset_position_ids": True},
            "data.reset_position_ids is true and has no effect on the student's rotary positions while "
            "data.reset_attention_mask is false.",
        ),
    ],
)
def test_settings_without_effect_on_text(folder: Path, settings: dict[str, Any], message: str) -> None:
    assert error(run_values(folder, **settings)).startswith(message)


@pytest.mark.parametrize("key", ["reset_position_ids", "reset_attention_mask", "eod_mask_loss"])
def test_settings_without_effect_on_examples(folder: Path, key: str) -> None:
    write_examples(folder / "chat", [([5, 6, 7], [0, 2, 2])])
    message = error(run_values(folder, data__train=str(folder / "chat"), **{f"data__{key}": True}))
    assert message.startswith(f"data.{key} is true and has no effect: data.train has no data set of text.")


def test_settings_of_both_kinds_go_with_a_blend_of_both(folder: Path) -> None:
    write_examples(folder / "chat", [([5, 6, 7], [0, 2, 2])])
    settings = {"data__packing": True, "data__reset_attention_mask": True, "data__reset_position_ids": True}
    blend = [str(folder / "data"), str(folder / "chat")]
    preflight(Config.model_validate(run_values(folder, data__train=blend, **settings)), 1)


def test_examples_without_their_mask(folder: Path) -> None:
    write_examples(folder / "chat", [([5, 6, 7], [0, 2, 2])])
    metadata = {"format": FORMAT, "version": VERSION, "kind": "examples"}
    (folder / "chat.json").write_text(json.dumps(metadata))
    (folder / "chat.mask.idx").unlink()
    message = error(run_values(folder, data__train=str(folder / "chat")))
    assert message.startswith(
        f"data.train: {folder}/chat is a data set of examples and {folder}/chat.mask.idx does not"
    )


def test_every_held_out_data_set_is_opened(folder: Path) -> None:
    message = error(run_values(folder, data__valid=[str(folder / "data"), str(folder / "gone")]))
    assert message.startswith(f"data.valid is {folder}/gone; {folder}/gone.bin does not exist.")


def test_steps_to_profile_beyond_the_run(folder: Path) -> None:
    values = run_values(folder, logging__profile={"steps": [3, 9]})
    assert error(values).startswith("logging.profile.steps is [3, 9]; the run ends at step 4. Name earlier steps")
    preflight(Config.model_validate(run_values(folder, logging__profile={"steps": [3, 4]})), 1)


def test_ranks_to_profile_that_do_not_exist(folder: Path) -> None:
    values = run_values(folder, logging__profile={"steps": [3, 4], "ranks": [1]})
    assert error(values).startswith("logging.profile.ranks has 1; the run has ranks 0 to 0.")


def test_weights_and_biases_must_be_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import megakd.training.preflight as module

    values = run_values(folder, logging__wandb={"project": "p", "mode": "offline"})
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "wandb" else True)
    message = error(values)
    assert message.startswith(
        "logging.wandb is set, and wandb is not installed here; it must be. Run `pip install wandb`"
    )
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: True)
    preflight(Config.model_validate(values), 1)
