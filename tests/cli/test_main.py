"""The front door: commands, their arguments, one error line and status 2, and no torch for `config`."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megakd._version import __version__
from megakd.cli.main import COMMANDS, main
from megakd.config.load import config_schema, load_config
from tests.config.examples import VALID

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(VALID))
    return str(path)


def test_config_prints_what_loads_back(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", file, "optimizer.lr=2e-3", "run.seed=7"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    (tmp_path / "printed.yaml").write_text(printed.out)
    assert load_config(tmp_path / "printed.yaml") == load_config(file, ["optimizer.lr=2e-3", "run.seed=7"])


def test_options_may_stand_before_the_command(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--world-size", "1", "config", file, "run.seed=7"]) == 0
    assert "seed: 7" in capsys.readouterr().out
    assert main(["--nnodes", "2", "--node-rank", "5", "train", file]) == 2
    assert capsys.readouterr().err.startswith("error: --node-rank is 5; with --nnodes 2")


def test_config_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == config_schema()


@pytest.mark.parametrize("order", ["--world-size 6 {} run.seed=7", "{} --world-size 6 run.seed=7", "{} run.seed=7"])
def test_options_may_stand_between_file_and_overrides(
    order: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", *order.format(file).split(), "parallel.tensor_model_parallel_size=4"]) == (
        2 if "--world-size" in order else 0
    )
    printed = capsys.readouterr()
    if "--world-size" in order:
        assert printed.err.startswith(
            "error: the run has 6 ranks; there must be a multiple of tensor_model_parallel_size 4 x "
        )
    else:
        assert "seed: 7" in printed.out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "no command given. Commands: train, plan, evaluate, cache, inspect-cache, verify-cache, "),
        (["trian"], "'trian' is not a command. Did you mean 'train'? Commands: train, "),
        (["xyz"], "'xyz' is not a command. Commands: train, "),
        (["config"], "config needs a YAML file, or --schema."),
        (["config", "x.yaml", "--schema"], "--schema stands alone; 'x.yaml' would have no effect."),
        (["config", "none.yaml"], "none.yaml does not exist; give a YAML file."),
        (["config", "FILE", "--world-size", "0"], "--world-size is 0; it must be at least 1."),
        (["config", "FILE", "optimizer.lr=fast"], "optimizer.lr is 'fast'; it must be a number."),
        (["config", "FILE", "distill.temperature=0"], "distill.temperature is 0; it must be > 0. Use 1.0 "),
        (["train", "FILE", "--nproc-per-node", "1", "distill.temprature=2"], "distill.temprature is not a setting."),
    ],
)
def test_bad_input_is_one_line_and_status_two(
    arguments: list[str], line: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([file if argument == "FILE" else argument for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {line}"), printed.err
    assert len(printed.err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["config", "--nothing"], ["--nothing"], ["config", "--world-size", "many"]])
def test_arguments_that_argparse_refuses_exit_with_two(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_help_lists_every_command_and_version_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    for option, expected in (("--help", list(COMMANDS)), ("--version", [__version__])):
        with pytest.raises(SystemExit) as caught:
            main([option])
        assert caught.value.code == 0
        printed = capsys.readouterr().out
        assert all(word in printed for word in expected)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m megakd {name} ")


def test_a_commands_status_is_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(COMMANDS["config"])
    monkeypatch.setattr(module, "run", lambda args: 7)
    assert main(["config"]) == 7

    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run", interrupted)
    assert main(["config"]) == 130


def test_python_m_megakd_answers_without_torch(file: str) -> None:
    """As a user starts it; the import list on standard error names every module."""
    command = [sys.executable, "-X", "importtime", "-m", "megakd"]
    for arguments in (["config", file], ["--help"]):
        done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0
        assert done.stdout
        modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
        assert "megakd" in modules
        assert not modules & {"torch", "megatron", "transformers", "numpy"}
    done = subprocess.run(
        [sys.executable, "-m", "megakd", "config", file, "a"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, "error: 'a' is not an override; write section.key=value.\n")
