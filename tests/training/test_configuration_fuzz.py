"""A changed configuration passes all checks before a run, or gives one line that names what was changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from megakd.common.errors import UserError
from megakd.common.logging import log
from megakd.config.load import load_config
from megakd.config.problems import section_of
from megakd.config.schema import Config
from megakd.training.preflight import preflight
from tests.training.runs import run_values, write_run_files, write_tokens

KeyPath = tuple[str, ...]
SLOW_EXAMPLES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def key_paths(section: type[BaseModel] = Config, above: KeyPath = ()) -> Iterator[KeyPath]:
    """Every section and key of the schema."""
    for name, field in section.model_fields.items():
        yield (*above, name)
        below = section_of(field.annotation)
        if below is not None and name not in ("train", "valid", "test"):
            yield from key_paths(below, (*above, name))


ALL_KEYS = list(key_paths())


def words_of(path: KeyPath) -> list[str]:
    """The words that a key may be set to."""
    section: Any = Config
    for name in path[:-1]:
        section = section_of(section.model_fields[name].annotation)
    found = get_args(section.model_fields[path[-1]].annotation)
    flat = [word for entry in found for word in (get_args(entry) or [entry])]
    return [word for word in flat if isinstance(word, str)]


ARCHITECTURE = {
    "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2,
    "vocab_size": 300, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run_files(tmp_path_factory.mktemp("files"))
    write_tokens(folder / "held_out", np.arange(100))
    return folder


@pytest.fixture
def bases(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Configurations of several kinds that are fine as they are. Relative paths end in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(log, "disabled", True)
    held_out = {"data__valid": str(files / "held_out"), "evaluation__interval": 2, "evaluation__at_end": True}
    full = run_values(
        files, **held_out, evaluation__metric="kl_to_teacher", evaluation__patience=2, checkpoint__save_interval=2,
        checkpoint__keep_last=2, optimizer__use_distributed_optimizer=True, optimizer__overlap_grad_reduce=True,
        distill__loss="jsd", distill__jsd_beta=0.3, schedule__lr_decay_style="cosine", schedule__lr_warmup_steps=2,
        parallel__tensor_model_parallel_size=1, run__time_limit_minutes=30, student__recompute_granularity="full",
    )  # fmt: skip
    scratch = run_values(files, data__valid_fraction=0.2, distill__kd_weight=0.0, distill__ce_weight=1.0)
    scratch["student"] = {"architecture": ARCHITECTURE}
    scratch["teacher"] = None
    scratch["run"]["export"] = False
    scratch["schedule"] = {"train_epochs": 1.0, "lr_decay_style": "linear"}
    return [run_values(files), full, scratch]


def outcome(tmp_path: Path, values: dict[str, Any]) -> str | None:
    """What a user is told of a configuration in a file; None where it passes."""
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    try:
        preflight(load_config(file), 1)
    except UserError as error:
        return str(error)
    return None


# Words and numbers that some key takes: each is wrong for the others.
PLAUSIBLE = st.booleans() | st.integers(0, 20) | st.floats(0, 2) | st.sampled_from(
    sorted({word for path in ALL_KEYS for word in words_of(path)})
)  # fmt: skip
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 20) | st.integers() | st.floats() | st.text(max_size=6)
    | st.sampled_from(["", "bf16", "auto", "1e-3", "no/such/place", "/proc/x", "\0", "fp32", "a" * 300]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=3,
)  # fmt: skip


def holder(values: dict[str, Any], path: KeyPath) -> dict[str, Any]:
    """The mapping that has, or is to have, the last name of a path."""
    for name in path[:-1]:
        below = values.get(name)
        values[name] = dict(below) if isinstance(below, dict) else {}
        values = values[name]
    return values


def present(values: Any, above: KeyPath = ()) -> Iterator[KeyPath]:
    """The keys that a configuration sets to something."""
    for name, value in values.items():
        if value is not None:
            yield (*above, name)
        if isinstance(value, dict):
            yield from present(value, (*above, name))


@st.composite
def misspelt(draw: st.DrawFn, name: str) -> str:
    at = draw(st.integers(0, len(name) - 1))
    return draw(st.sampled_from([name[:at] + name[at + 1 :], name[:at] + name[at] + name[at:], f"{name}_{at}"]))


@settings(max_examples=500, suppress_health_check=SLOW_EXAMPLES)
@given(st.data())
def test_a_changed_configuration_passes_or_its_changed_key_is_named(
    bases: list[dict[str, Any]], tmp_path: Path, data: st.DataObject
) -> None:
    values = copy.deepcopy(data.draw(st.sampled_from(bases)))
    how = data.draw(st.sampled_from(["replaced", "replaced", "misspelt", "removed"]))
    if how == "replaced":
        path = data.draw(st.sampled_from(ALL_KEYS))
        given_before = set(present(values))
        holder(values, path)[path[-1]] = data.draw(PLAUSIBLE | ANYTHING)
        # With the key of a section that was not there, the section is what was changed.
        names = [path[depth] for depth in range(len(path)) if path[: depth + 1] not in given_before] or [path[-1]]
    else:
        path = data.draw(st.sampled_from(sorted(present(values))))
        value = holder(values, path).pop(path[-1])
        names = [path[-1]]
        if how == "misspelt":
            names = [data.draw(misspelt(path[-1]))]
            holder(values, path)[names[0]] = value
    line = outcome(tmp_path, values)
    event(f"{how}: {'passes' if line is None else 'is refused'}")
    if line is not None:
        assert line and "\n" not in line and "\r" not in line
        assert "Traceback" not in line and "Input should" not in line
        assert any(name in line for name in names), (path, line)


@settings(max_examples=60, suppress_health_check=SLOW_EXAMPLES)
@given(st.data())
def test_unchanged_configurations_pass(bases: list[dict[str, Any]], tmp_path: Path, data: st.DataObject) -> None:
    """Written with the keys in any order, and with defaults spelt out."""
    values = data.draw(st.sampled_from(bases))
    assert outcome(tmp_path, values) is None


counts = st.integers(1, 10**6)
shares = st.floats(0.05, 0.95)
weights = st.floats(0.001, 100)
# Values that are right whatever else these configurations say.
RIGHT: dict[str, st.SearchStrategy[Any]] = {
    "run.name": st.text(min_size=1, max_size=9), "run.seed": st.integers(0, 2**32 - 1),
    "run.dtype": st.sampled_from(["fp32", "bf16"]), "run.layer_spec": st.sampled_from(["auto", "local"]),
    "run.time_limit_minutes": st.none() | weights,
    "student.make_vocab_size_divisible_by": st.integers(1, 512),
    "student.recompute_granularity": st.sampled_from(["none", "selective", "full"]),
    "distill.ce_weight": weights, "distill.loss_chunk_mib": st.none() | counts,
    "data.micro_batch_size": st.sampled_from([1, 2, 4, 8]), "data.global_batch_size": st.sampled_from([8, 16, 24]),
    "data.sequence_length": st.integers(1, 16), "data.valid_fraction": shares,
    "optimizer.lr": st.floats(1e-7, 1), "optimizer.weight_decay": st.floats(0, 1),
    "optimizer.adam_beta1": st.floats(0, 0.99), "optimizer.adam_beta2": st.floats(0, 0.999),
    "optimizer.adam_eps": st.floats(1e-15, 1e-3), "optimizer.clip_grad": st.floats(0, 10),
    "checkpoint.save_interval": st.none() | counts, "checkpoint.save_at_end": st.booleans(),
    "checkpoint.resume": st.booleans(), "checkpoint.keep_last": st.none() | counts,
    "checkpoint.async_save": st.booleans(), "checkpoint.on_write_error": st.sampled_from(["continue", "stop"]),
    "safeguards.max_skipped_steps": counts, "safeguards.loss_spike_deviations": st.none() | weights,
    "safeguards.hang_timeout_seconds": st.none() | weights,
    "logging.log_interval": counts, "logging.tensorboard": st.booleans(),
    "evaluation.max_tokens": st.integers(16, 10**6),
}  # fmt: skip


@settings(max_examples=200, suppress_health_check=SLOW_EXAMPLES)
@given(st.data())
def test_right_values_pass(bases: list[dict[str, Any]], tmp_path: Path, data: st.DataObject) -> None:
    values = copy.deepcopy(data.draw(st.sampled_from(bases)))
    for key in data.draw(st.sets(st.sampled_from(sorted(RIGHT)), min_size=1, max_size=4)):
        path = tuple(key.split("."))
        if key == "data.valid_fraction" and "valid" in values["data"]:
            continue  # one or the other
        holder(values, path)[path[-1]] = data.draw(RIGHT[key])
    assert outcome(tmp_path, values) is None
