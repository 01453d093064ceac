"""Every configuration in configs/ passes all checks on its cluster, and trains when it is made small."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from megakd.common.errors import UserError
from megakd.config.checks import check_config
from megakd.config.load import config_from_dict, dump_config, load_config
from megakd.config.schema import Config
from megakd.training.preflight import preflight, preflight_cache
from tests.configs.examples import (
    FILES,
    ROOT,
    cluster_of,
    ranks_of,
    read_values,
    scaled_down,
    shape_folder,
    with_sparse_files,
)
from tests.training.runs import run_sides

CACHED = [name for name in FILES if "cache" in read_values(name)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sparse models and data, shared by all files."""
    return tmp_path_factory.mktemp("sparse")


def keys(values: Any, prefix: str = "") -> set[str]:
    if not isinstance(values, dict):
        return {prefix}
    return {key for name, value in values.items() for key in keys(value, f"{prefix}.{name}" if prefix else name)}


def test_configs_readme_names_every_file() -> None:
    text = (ROOT / "configs" / "README.md").read_text()
    assert [name for name in FILES if f"]({name})" not in text] == []


@pytest.mark.parametrize("name", FILES)
def test_passes_every_check_on_its_cluster(name: str, folder: Path) -> None:
    cluster = cluster_of(name)
    config = config_from_dict(with_sparse_files(read_values(name), folder))
    preflight(config, cluster.world_size)
    with pytest.raises(UserError, match="ranks|global_batch_size"):
        preflight(config, cluster.world_size + 1)


@pytest.mark.parametrize("name", CACHED)
def test_a_cache_can_be_written_on_its_cluster(name: str, folder: Path) -> None:
    preflight_cache(config_from_dict(with_sparse_files(read_values(name), folder)), cluster_of(name).world_size)


@pytest.mark.parametrize("name", FILES)
def test_loads_as_it_stands_and_names_models_of_known_shapes(name: str, tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / name)
    assert config.teacher is not None and config.student.init is not None
    for path in (config.teacher.path, config.student.init.path):
        assert (shape_folder(path) / "config.json").is_file()
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("name", FILES)
def test_the_commands_in_its_header_are_possible_on_its_cluster(name: str) -> None:
    for overrides in header_overrides(name):
        check_config(load_config(ROOT / "configs" / name, overrides), cluster_of(name).world_size)


def run(values: dict[str, Any]) -> None:
    from megakd.training import distill

    distill(Config.model_validate(values), accept_changes=True)


def write(values: dict[str, Any]) -> None:
    from megakd.training.caching import write_cache

    write_cache(Config.model_validate(values))


def small(name: str, folder: Path) -> dict[str, Any]:
    """A file made small, with every key that it has but the length."""
    values = scaled_down(read_values(name), folder)
    lengths = {"schedule.train_tokens", "schedule.train_epochs"}
    assert keys(read_values(name)) - keys(values) <= lengths
    return values


def assert_trained(run_folder: Path) -> None:
    steps = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(math.isfinite(step["loss"]) and 0 < step["grad_norm"] < math.inf for step in steps)
    evaluations = (run_folder / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in evaluations] == [0, 1, 2]
    assert (run_folder / "checkpoints" / "step-00000002" / "record.json").is_file()
    AutoModelForCausalLM.from_pretrained(run_folder / "student")


@pytest.mark.parametrize("name", [name for name in FILES if name not in CACHED])
def test_trains_when_made_small(name: str, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    values = small(name, tmp_path)
    own = values["teacher"].get("ranks", 0)
    run_ranks(ranks_of(values) + own, run_sides if own else run, values, teacher_ranks=own)
    assert_trained(tmp_path / "run")


@pytest.mark.parametrize("name", CACHED)
def test_trains_from_its_cache_when_made_small(name: str, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    values = small(name, tmp_path)
    run_ranks(values["parallel"]["tensor_model_parallel_size"], write, values)
    (changes,) = [overrides for overrides in header_overrides(name) if overrides]
    settings = dict(change.split("=") for change in changes)
    assert settings.pop("teacher.source") == "cache"
    assert settings.pop("teacher.path") == f"{read_values(name)['run']['output_dir']}/teacher_cache"
    for key, value in settings.items():
        section, entry = key.split(".")
        values[section][entry] = yaml.safe_load(value)
    values["teacher"] = {"source": "cache", "path": str(tmp_path / "run" / "teacher_cache")}
    run_ranks(ranks_of(values), run, values)
    assert_trained(tmp_path / "run")


def header_overrides(name: str) -> list[list[str]]:
    """The settings that each `train` command in a file's header replaces."""
    text = (ROOT / "configs" / name).read_text().replace("\\\n#", "")
    commands = [line.split() for line in text.splitlines() if line.startswith("#   ./launch.sh train ")]
    assert commands and all(words[3] == f"configs/{name}" for words in commands)
    return [[word for word in words if "=" in word] for words in commands]
