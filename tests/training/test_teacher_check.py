"""A teacher whose weights go wrong in memory stops the run, wherever it is and whatever is held out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megakd.config.schema import Config
from megakd.training.held_out import checks_teacher_after, checks_teacher_first
from tests.training.runs import (
    SEQUENCE,
    VOCAB,
    assert_same_run,
    layout,
    records,
    run_sides,
    run_values,
    save_llama,
    write_run_files,
)
from tests.workers import RankPools

STEPS, WRONG_AFTER = 6, 3
EVALUATED = {"data__valid_fraction": 0.1, "evaluation__interval": 2}
DEDICATED = {"placement": "dedicated", "ranks": 1, "parallel": {"tensor_model_parallel_size": 1}}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def run_once() -> Iterator[Callable[..., list[Any]]]:
    """`run_ranks` in a pool that is left afterwards: what a teacher sent ahead to a run that stopped is still there."""
    pools = RankPools()
    yield pools.run_ranks
    pools.close()


def values_of(files: Path, out: Path, own: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    fixed: dict[str, Any] = {
        "run__output_dir": str(out / "run"), "run__export": False, "schedule__train_steps": STEPS,
        "checkpoint__save_interval": 2, "logging__log_interval": 1000,
    }  # fmt: skip
    values = run_values(files, **(fixed | settings))
    values["teacher"].update(own or {})
    return values


def spoil(model: torch.nn.Module, parked: Any, how: str) -> None:
    """Change weights of a teacher's stage where they are kept: all logits alike, or one number of one weight."""
    kept = None if parked is None else [tensor for _, tensor in parked._parked]
    for place, (name, parameter) in enumerate(model.named_parameters()):
        tensor = parameter.data if kept is None else kept[place]
        if how == "alike" and "final_layernorm" in name:
            tensor.zero_()
        elif how == "one" and name == "decoder.layers.0.mlp.linear_fc1.weight":
            tensor[3, 5] = 100.0


@contextmanager
def spoiled(after: int, how: str) -> Iterator[list[Any]]:
    """Inside, a run's teacher goes wrong when a step is done, 0 being before the first; gives the student's runs."""
    from megakd.teacher import TeacherServer
    from megakd.training import held_out, run

    runs: list[Any] = []
    train_step, train, compute = run.Run._train_step, run.Run.train, TeacherServer.compute

    def spoil_of(self: Any) -> None:
        if self._counters.step == after and hasattr(self._teacher, "_stage"):
            spoil(self._teacher._stage.model, self._teacher._parked, how)

    def trained(self: Any) -> Any:
        runs.append(self)
        spoil_of(self)
        return train(self)

    def stepped(self: Any, *arguments: Any) -> None:
        train_step(self, *arguments)
        spoil_of(self)

    def computed(self: Any, *arguments: Any) -> None:
        # A window of its own before the first step.
        if self._sent + len(self._leaving) == after + 1:
            spoil(self._stage.model, None, how)
        compute(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Run, "train", trained)
        patch.setattr(run.Run, "_train_step", stepped)
        patch.setattr(TeacherServer, "compute", computed)
        patch.setattr(held_out, "_WINDOWS_PER_CHECK", 1)  # at every checkpoint
        yield runs


def stop_of(values: dict[str, Any], after: int = WRONG_AFTER, how: str = "alike") -> tuple[str | None, int]:
    """What a run whose teacher goes wrong stops with, and after which step."""
    from megakd.common.errors import UserError
    from megakd.config.load import config_from_dict
    from megakd.training.loop import distill
    from tests.workers import joint_rank_is_teacher

    dedicated = values["teacher"].get("placement") == "dedicated"
    with spoiled(after, how) as runs:
        try:
            if dedicated:
                run_sides(values)
            else:
                distill(config_from_dict(values), accept_changes=True)
        except UserError as error:
            if dedicated:
                runs[0]._end_teacher()
            return str(error), runs[0]._counters.step
    if dedicated and joint_rank_is_teacher():
        return None, -1
    return None, runs[0]._counters.step


TEACHERS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "offloaded": (1, layout(), {"offload": "cpu"}),
    "offloaded_own_layout": (2, layout(2), {"offload": "cpu", "parallel": {"tensor_model_parallel_size": 1}}),
    "colocated": (2, layout(1, 2), {}),
    "dedicated": (3, layout(2), DEDICATED),
}


@pytest.mark.parametrize("held_out", [EVALUATED, {}], ids=["evaluated", "nothing_held_out"])
@pytest.mark.parametrize(("name", "how"), [*((name, "alike") for name in TEACHERS), ("offloaded", "one")])
def test_a_teacher_that_went_wrong_stops_the_run(
    files: Path,
    tmp_path: Path,
    run_ranks: Callable[..., list[Any]],
    run_once: Callable[..., list[Any]],
    name: str,
    how: str,
    held_out: dict[str, Any],
) -> None:
    ranks, placed, own = TEACHERS[name]
    values = values_of(files, tmp_path, own, **placed, **held_out)
    run = run_once if name == "dedicated" else run_ranks
    found = run(ranks, stop_of, values, WRONG_AFTER, how, teacher_ranks=own.get("ranks", 0))
    of_student = [one for one in found if one != (None, -1)]
    assert len(of_student) == ranks - own.get("ranks", 0)
    (told, step), *others = of_student
    assert others == [(told, step)] * len(others) and step == 4, found
    where = "held-out samples" if held_out else "the samples of the first step"
    assert told.startswith(f"the teacher ({files / 'teacher'}) has a cross-entropy of ")
    assert f" on {where} after step 4 and had " in told and "\n" not in told
    assert "before the first step; the same weights give the same to 0.001 of it (float32)." in told
    assert "went wrong in memory after step 2," in told and ("teacher.offload to none" in told) == ("offload" in own)
    if how == "alike":
        assert f"has a cross-entropy of {math.log(VOCAB):.6g} on" in told
    # What was learned of it is in no checkpoint, and no score of it is written.
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").glob("step-*"))] == ["step-00000002"]
    if held_out:
        assert [record["step"] for record in records(tmp_path, "evaluations.jsonl")] == [2]


def figure(out: Path, step: int) -> dict[str, Any]:
    """What a checkpoint has of the teacher."""
    record = json.loads((out / "run" / "checkpoints" / f"step-{step:08d}" / "record.json").read_text())
    found: dict[str, Any] = record["counters"]["teacher"]
    return found


@pytest.mark.parametrize(
    ("name", "ranks", "replicas", "settings"),
    [
        ("held_out", 2, 1, layout(2, parallel__sequence_parallel=True) | EVALUATED),
        ("held_out", 2, 2, {"teacher__parallel": {"tensor_model_parallel_size": 2}} | EVALUATED),
        ("training", 2, 1, layout(1, 2)),
        ("training", 1, 1, {"run__dtype": "bf16"}),
    ],
)
def test_a_sound_teacher_s_figure_is_that_of_transformers(
    files: Path,
    tmp_path: Path,
    run_ranks: Callable[..., list[Any]],
    name: str,
    ranks: int,
    replicas: int,
    settings: dict[str, Any],
) -> None:
    from transformers import AutoModelForCausalLM

    from megakd.training.train_data import open_held_out_data, open_train_data

    values = values_of(files, tmp_path, **settings)
    assert run_ranks(ranks, stop_of, values, -1) == [(None, STEPS)] * ranks
    config = Config.model_validate(values)
    if name == "held_out":
        data = open_held_out_data(config, "valid")
        samples = [data.samples.sample(int(index)) for index in data.ids[: 2 * replicas]]
    else:
        train = open_train_data(config)
        samples = [train.samples.sample(int(index)) for index in train.order.sample_ids(0, 2 * replicas)]
    model = AutoModelForCausalLM.from_pretrained(files / "teacher").double()
    tokens, labels = (torch.tensor([getattr(one, of).tolist() for one in samples]) for of in ("tokens", "labels"))
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
    kept = figure(tmp_path, STEPS)
    assert kept["value"] == pytest.approx(float(expected), rel=1e-5 if "run__dtype" not in settings else 1e-2)
    assert (kept["step"], kept["good_step"]) == (0, STEPS)
    assert kept["value"] == figure(tmp_path, 2)["value"]


def test_a_teacher_that_comes_back_wrong(files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    values = values_of(files, tmp_path)
    assert run_ranks(1, stop_of, values | {"schedule": values["schedule"] | {"train_steps": 2}}, -1) == [(None, 2)]
    ((told, step),) = run_ranks(1, stop_of, values, 0)  # spoiled before the checkpoint is loaded
    assert step == 2 and "after step 2 and had " in told and "before the first step; the same weights" in told


def test_another_teacher_that_was_accepted(files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    values = values_of(files, tmp_path)
    assert run_ranks(1, stop_of, values | {"schedule": values["schedule"] | {"train_steps": 2}}, -1) == [(None, 2)]
    save_llama(tmp_path / "other", seed=5, std=0.3, hidden_size=48, num_hidden_layers=2)
    before = figure(tmp_path, 2)
    values["teacher"]["path"] = str(tmp_path / "other")
    assert run_ranks(1, stop_of, values, -1) == [(None, STEPS)]
    after = figure(tmp_path, STEPS)
    assert after["step"] == 2 and after["value"] != pytest.approx(before["value"], rel=1e-3)


def test_a_checkpoint_of_before_figures_were_kept() -> None:
    from megakd.training.watch import Counters

    values = Counters(step=3).to_dict()
    del values["teacher"]
    assert Counters.from_dict(values) == Counters(step=3)


def heard(values: dict[str, Any]) -> str:
    """What a run says, and stops with."""
    from megakd.common.errors import UserError
    from tests.training.interrupted import run_and_listen

    try:
        return run_and_listen(values)
    except UserError as error:
        return f"error: {error}"


FIRST = "the teacher ({}) has a cross-entropy of {} on the samples of the first step before the first step"


@pytest.mark.parametrize(
    ("value", "shown", "told"),
    [
        (torch.nan, "nan", "; it must be a finite number. Its weights are damaged"),
        (0.0, "5.70378", ", no better than a guess among 300 ids (5.70378): its weights are random or damaged"),
    ],
)
def test_a_teacher_that_is_wrong_from_the_start(
    files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]], value: float, shown: str, told: str
) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_bytes((files / "teacher" / "config.json").read_bytes())
    weights = load_file(files / "teacher" / "model.safetensors")
    weights["model.norm.weight"].fill_(value)
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    values = values_of(files, tmp_path, {"path": str(teacher)}, schedule__train_steps=1)
    (said,) = run_ranks(1, heard, values)
    assert FIRST.format(teacher, shown) + told in said and said.startswith("error: ") == math.isnan(value)


def unchecked(values: dict[str, Any]) -> None:
    """Train without measuring the teacher."""
    from megakd.config.load import config_from_dict
    from megakd.training import run
    from megakd.training.loop import distill

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "build_teacher_check", lambda *arguments: None)
        distill(config_from_dict(values))


def test_measuring_changes_nothing(files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    settings = layout(2) | {"run__export": True, "run__dtype": "bf16"}
    run_ranks(2, stop_of, values_of(files, tmp_path / "with", **settings), -1)
    run_ranks(2, unchecked, values_of(files, tmp_path / "without", **settings))
    assert_same_run(tmp_path / "with", tmp_path / "without", STEPS)


@pytest.mark.parametrize(
    ("save_interval", "window", "expected"),
    [(30, None, [120, 240, 250]), (60, 1, [60, 120, 180, 240, 250]), (None, None, [250]), (200, None, [200, 250])],
)
def test_when_it_is_measured(
    files: Path, tmp_path: Path, save_interval: int | None, window: int | None, expected: list[int]
) -> None:
    """Every hundred windows at most, where a checkpoint is due; a step has four windows of one microbatch."""
    values = values_of(files, tmp_path, {"signal_window": window}, checkpoint__save_interval=save_interval)
    config = Config.model_validate(values)
    found = [step for step in range(1, 251) if checks_teacher_after(step, 250, config, 1)]
    assert found == expected
    assert checks_teacher_first(config, 0, 250) and checks_teacher_first(config, 30, 250)
    assert not checks_teacher_first(config, 250, 250)


def test_an_evaluation_measures_it(files: Path, tmp_path: Path) -> None:
    settings = {"data__valid_fraction": 0.1, "evaluation__interval": 50, "evaluation__at_start": True}
    config = Config.model_validate(values_of(files, tmp_path, checkpoint__save_interval=100, **settings))
    assert [step for step in range(1, 251) if checks_teacher_after(step, 250, config, 1)] == []
    assert not checks_teacher_first(config, 0, 250) and checks_teacher_first(config, 1, 250)
    alone = config.model_copy(update={"distill": config.distill.model_copy(update={"kd_weight": 0.0})})
    assert not checks_teacher_first(alone, 1, 250) and not checks_teacher_after(240, 240, alone, 1)
    assert SEQUENCE == config.data.sequence_length
