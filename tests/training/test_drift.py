"""Settings that change the result are not changed between two halves of a run without a word."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from megakd.checkpoint.folders import checkpoint_steps
from megakd.common.errors import UserError
from megakd.config.load import config_from_dict
from megakd.config.problems import section_of
from megakd.config.schema import Config
from megakd.data.identity import file_hash
from megakd.training.drift import describe_contents, find_changes
from megakd.training.preflight import preflight
from megakd.training.train_data import open_train_data
from tests.data.example_files import write_examples, write_pair
from tests.training.interrupted import run_and_listen, run_distill, run_until_killed
from tests.training.runs import layout, records, run_values, save_llama, write_run_files, write_tokens

# Every key, decided on purpose: what may change without a word, because each step stays what it was, and the rest.
HARMLESS = {
    "run.name", "run.output_dir", "run.export", "run.time_limit_minutes", "run.layer_spec",
    "student.recompute_granularity", "distill.loss_chunk_mib", "data.valid", "data.test", "data.micro_batch_size",
    "optimizer.overlap_grad_reduce", "optimizer.overlap_param_gather", "teacher.parallel", "teacher.placement",
    "teacher.ranks", "teacher.prefetch_steps", "teacher.signal_window", "teacher.offload",
}  # fmt: skip
HARMLESS_SECTIONS = {"cache", "parallel", "checkpoint", "safeguards", "logging", "evaluation"}
ALTERING = {
    "run.seed", "run.dtype", "student.init", "student.architecture", "student.make_vocab_size_divisible_by",
    "teacher.source", "teacher.path", "teacher.dtype", "distill.loss", "distill.jsd_beta", "distill.skew_alpha",
    "distill.kd_weight", "distill.ce_weight", "distill.temperature", "distill.teacher_temperature",
    "distill.temperature_squared", "data.train", "data.valid_fraction", "data.test_fraction", "data.sequence_length",
    "data.reset_position_ids", "data.reset_attention_mask", "data.eod_mask_loss", "data.loss_on", "data.truncation",
    "data.packing", "data.global_batch_size", "optimizer.lr", "optimizer.min_lr", "optimizer.weight_decay",
    "optimizer.adam_beta1", "optimizer.adam_beta2", "optimizer.adam_eps", "optimizer.clip_grad",
    "optimizer.use_distributed_optimizer", "schedule.train_steps", "schedule.train_tokens", "schedule.train_epochs",
    "schedule.lr_decay_style", "schedule.lr_warmup_steps",
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run_files(tmp_path_factory.mktemp("files"))
    write_tokens(folder / "held_out", np.arange(100))
    save_llama(folder / "other", seed=9, num_hidden_layers=4)
    return folder


def keys() -> Iterator[str]:
    """section.key of the whole schema."""
    for section, field in Config.model_fields.items():
        model = section_of(field.annotation)
        assert model is not None and issubclass(model, BaseModel)
        yield from (f"{section}.{name}" for name in model.model_fields)


def test_every_key_is_decided() -> None:
    found = {key for key in keys() if key.split(".")[0] not in HARMLESS_SECTIONS}
    assert found == HARMLESS | ALTERING
    assert not HARMLESS & ALTERING


def changed(value: object) -> object:
    """Another value than a setting's."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else "another"


@pytest.mark.parametrize("key", sorted(set(keys())))
def test_what_a_changed_key_is_taken_for(files: Path, key: str) -> None:
    from megakd.checkpoint.record import Record

    config = config_from_dict(run_values(files, schedule__lr_decay_style="cosine"))
    section, name = key.split(".")
    before = config.model_dump(mode="json")
    before[section][name] = changed(before[section][name])
    (change,) = find_changes(Record(1, {}, before, {}, ""), config)
    assert change.key.startswith(key)
    assert change.alters == (key in ALTERING)
    assert find_changes(Record(1, {}, config.model_dump(mode="json"), {}, ""), config) == []


def test_a_key_that_an_older_record_lacks_was_at_its_default(files: Path) -> None:
    from megakd.checkpoint.record import Record

    config = config_from_dict(run_values(files, optimizer__clip_grad=2.0))
    before = config.model_dump(mode="json")
    lacking = [("safeguards", None), ("data", "packing"), ("optimizer", "clip_grad"), ("teacher", "parallel")]
    for section, name in lacking:
        del (before if name is None else before[section])[name or section]
    assert [str(change) for change in find_changes(Record(1, {}, before, {}, ""), config)] == [
        "optimizer.clip_grad was 1.0 and is 2.0"
    ]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"run__seed": 7}, "run.seed was 1234 and is 7"),
    "batch": ({"data__global_batch_size": 16}, "data.global_batch_size was 8 and is 16"),
    "length": ({"data__sequence_length": 8}, "data.sequence_length was 16 and is 8"),
    "loss": ({"distill__loss": "reverse_kl"}, "distill.loss was 'forward_kl' and is 'reverse_kl'"),
    "weight": ({"distill__kd_weight": 0.25}, "distill.kd_weight was 0.5 and is 0.25"),
    "temperature": ({"distill__temperature": 2.0}, "distill.temperature was 1.0 and is 2.0"),
    "rate": ({"optimizer__lr": 1e-3}, "optimizer.lr was 0.004 and is 0.001"),
    "dtype": ({"run__dtype": "bf16"}, "run.dtype was 'fp32' and is 'bf16'"),
    "teacher": ({"teacher__path": "other"}, "teacher.path was '"),
    "held_out": ({"data__valid_fraction": 0.1}, "data.valid_fraction was null and is 0.1"),
    "two": ({"run__seed": 7, "optimizer__lr": 1e-3}, "run.seed was 1234 and is 7; optimizer.lr was 0.004 and is 0.001"),
}


@pytest.fixture(scope="module")
def begun(files: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., list[Any]]) -> Path:
    """The folder of a run that was killed after three of six steps."""
    out = tmp_path_factory.mktemp("begun")
    run_ranks(1, run_until_killed, begun_values(files, out), 3)
    return out


def begun_values(files: Path, out: Path, **settings: Any) -> dict[str, Any]:
    fixed = {"run__output_dir": str(out / "run"), "schedule__train_steps": 6, "checkpoint__save_interval": 1}
    return run_values(files, **(fixed | settings))


@pytest.mark.parametrize("name", REFUSED)
def test_a_change_of_the_result_is_refused_with_both_values(files: Path, begun: Path, name: str) -> None:
    changes, line = REFUSED[name]
    values = begun_values(files, begun, **changes)
    if name == "teacher":
        values["teacher"]["path"] = str(files / "other")
    with pytest.raises(UserError) as error:
        preflight(config_from_dict(values), 1)
    assert line in str(error.value) and "--accept-changes" in str(error.value)
    assert "\n" not in str(error.value)
    preflight(config_from_dict(values), 1, accept_changes=True)
    values["checkpoint"]["resume"] = False
    preflight(config_from_dict(values), 1)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_a_damaged_record_is_not_taken_for_other_settings(
    files: Path, begun: Path, tmp_path: Path, place: float, mask: int
) -> None:
    """Before the ranks start, too: they find the damage and use the checkpoint before."""
    if not (tmp_path / "run").exists():
        shutil.copytree(begun / "run", tmp_path / "run")
    newest = list(checkpoint_steps(tmp_path / "run" / "checkpoints").values())[-1] / "record.json"
    content = newest.read_bytes()
    changed = bytearray(content)
    changed[int(place * len(content))] ^= mask
    newest.write_bytes(changed)
    try:
        preflight(config_from_dict(begun_values(files, tmp_path)), 1)
        with pytest.raises(UserError, match="run.seed was 1234 and is 7"):
            preflight(config_from_dict(begun_values(files, tmp_path, run__seed=7)), 1)
    finally:
        newest.write_bytes(content)


def test_ranks_refuse_what_preflight_refuses(files: Path, begun: Path, run_ranks: Callable[..., list[Any]]) -> None:
    with pytest.raises(UserError, match="run.seed was 1234 and is 7"):
        run_ranks(2, run_distill, begun_values(files, begun, run__seed=7))


def test_an_accepted_change_is_logged_and_no_change_afterwards(
    files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    run_ranks(1, run_until_killed, begun_values(files, tmp_path), 3)
    (text,) = run_ranks(1, run_and_listen, begun_values(files, tmp_path, optimizer__lr=1e-3), True)
    assert "optimizer.lr was 0.004 and is 0.001, as accepted" in text
    # The checkpoint of the last step before the kill was being written.
    assert [record["learning_rate"] for record in records(tmp_path)] == [4e-3] * 2 + [1e-3] * 4
    run_ranks(1, run_distill, begun_values(files, tmp_path, optimizer__lr=1e-3))


def test_harmless_changes_go_on_and_are_logged(
    files: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    run_ranks(1, run_until_killed, begun_values(files, tmp_path), 3)
    values = begun_values(
        files, tmp_path, **layout(2), run__name="again", run__export=False, data__micro_batch_size=4,
        data__valid=str(files / "held_out"), evaluation__interval=2, logging__log_interval=1,
        safeguards__max_skipped_steps=3, distill__loss_chunk_mib=1, checkpoint__keep_last=1, schedule__train_steps=8,
    )  # fmt: skip
    text, other = run_ranks(2, run_and_listen, values)
    assert other == ""
    for line in ("parallel.tensor_model_parallel_size was 1 and is 2", "schedule.train_steps was 6 and is 8",
                 "data.micro_batch_size was 2 and is 4", "run.name was 'distill' and is 'again'"):  # fmt: skip
        assert line in text
    assert len(records(tmp_path)) == 8


@pytest.mark.parametrize("place", ["data", "teacher"])
def test_files_with_other_contents_are_refused(tmp_path: Path, place: str, run_ranks: Callable[..., list[Any]]) -> None:
    """Under the same names, and of the same size."""
    files = write_run_files(tmp_path)
    values = begun_values(files, tmp_path)
    run_ranks(1, run_until_killed, values, 3)
    if place == "data":
        content = bytearray((files / "data.bin").read_bytes())
        content[6] ^= 1
        (files / "data.bin").write_bytes(content)
    else:
        save_llama(files / "teacher", seed=3, std=0.2, hidden_size=48, num_hidden_layers=2)
    name = f"data.train {files / 'data'}" if place == "data" else "teacher.path"
    with pytest.raises(UserError, match=rf"the contents of {name} was '\w+' and is '\w+'.*--accept-changes"):
        run_ranks(2, run_distill, values)
    run_ranks(1, run_distill, values, True)
    assert len(records(tmp_path)) == 6


def test_token_weights_are_contents_too(files: Path, tmp_path: Path) -> None:
    prefix = write_examples(tmp_path / "chat", [([1, 2, 3], [0, 2, 2]), ([4, 5], [0, 2])])
    config = config_from_dict(run_values(files, data__train=prefix))
    path = f"the contents of data.train {prefix}"

    def contents() -> dict[str, str]:
        return describe_contents(config, open_train_data(config))

    plain = contents()
    assert plain[path] == file_hash(f"{prefix}.idx", f"{prefix}.bin") + file_hash(
        f"{prefix}.mask.idx", f"{prefix}.mask.bin"
    )
    write_pair(f"{prefix}.weight", [[1.0, 1.0, 0.5], [1.0, 1.0]], np.float32)
    halved = contents()
    write_pair(f"{prefix}.weight", [[1.0, 1.0, 0.25], [1.0, 1.0]], np.float32)
    assert len({found[path] for found in (plain, halved, contents())}) == 3
    assert all({**found, path: ""} == {**plain, path: ""} for found in (halved, contents()))
