"""A conversion that is killed: nothing that looks whole, the earlier one is never lost, and a rerun is right."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megakd.convert.output_folder import OutputFolder
from megakd.convert.shard_writer import EXPORTED
from tests.convert.family_models import save_model
from tools.convert_checkpoint import main

ROOT = Path(__file__).resolve().parents[2]
# When the conversion kills itself.
MOMENTS = {
    "unlocked": "before(fcntl, 'flock')",
    "made": "before(Path, 'mkdir', lambda path: path.name == 'new')",
    "writing": "before(PiecewiseFile, 'write', lambda file, data: file.tell() > 50000)",
    "flushing": "before(output_folder, '_flush', lambda path: path.name == 'config.json')",
    "whole": "before(Path, 'rename', lambda path, to: path.name == 'out')",
    "between": "before(Path, 'rename', lambda path, to: path.name == 'new')",
    "in place": "before(shutil, 'rmtree', lambda path: path.name == 'old')",
    "unmarked": "before(Path, 'rmdir', lambda path: path.name == '.out.tmp')",
}
PROGRAM = """
import fcntl, os, shutil, sys
from pathlib import Path
from megakd.common.piecewise_file import PiecewiseFile
from megakd.convert import output_folder
from tools.convert_checkpoint import main
def before(holder, name, when=lambda *args: True):
    function = getattr(holder, name)
    def killed(*args, **kwargs):
        if when(*args):
            os.kill(os.getpid(), 9)
        return function(*args, **kwargs)
    setattr(holder, name, killed)
{moment}
sys.exit(main(sys.argv[1:]))
"""


def content(folder: Path) -> dict[str, bytes]:
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    # torch puts a random id into .metadata.
    return {name: b"" if file.name == ".metadata" else file.read_bytes() for name, file in files.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and what import and export make of them."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("qwen2", "qwen3"):
        save_model(folder / name, name, torch.bfloat16)
        assert main(["import", "--hf", str(folder / name), "--out", str(folder / f"{name}-import")]) == 0
        command = ["export", "--megatron", str(folder / f"{name}-import"), "--out", str(folder / f"{name}-export")]
        assert main(command) == 0
    return folder


@pytest.mark.parametrize(
    ("command", "moment", "replacing"),
    [
        *(("import", moment, True) for moment in MOMENTS),
        *(("import", moment, False) for moment in ("writing", "between")),
        *(("export", moment, True) for moment in ("writing", "between")),
    ],
)
def test_killed(models: Path, tmp_path: Path, command: str, moment: str, replacing: bool) -> None:
    out = tmp_path / "out"
    earlier, later = content(models / f"qwen3-{command}"), content(models / f"qwen2-{command}")
    if replacing:
        shutil.copytree(models / f"qwen3-{command}", out)
    source = {"import": ["--hf", str(models / "qwen2")], "export": ["--megatron", str(models / "qwen2-import")]}
    arguments = [command, *source[command], "--out", str(out), "--overwrite"]
    program = PROGRAM.format(moment=MOMENTS[moment])
    process = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert {entry.name for entry in tmp_path.iterdir()} <= {"out", ".out.tmp"}
    if moment in ("in place", "unmarked"):
        assert content(out) == later
    elif replacing:
        kept = tmp_path / ".out.tmp" / "old" if moment == "between" else out
        assert content(kept) == earlier
        # A rerun that is refused has brought it back.
        assert main([command, *source[command], "--out", str(out)]) == 2
        assert content(out) == earlier
    assert out.exists() == (replacing or moment in ("in place", "unmarked"))
    assert main(arguments) == 0
    assert content(out) == later
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_what_was_moved_away_is_kept_where_another_has_its_place(models: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / ".out.tmp"
    OutputFolder(out, EXPORTED, overwrite=False).discard()
    work.mkdir()
    for name in ("new", "old"):
        shutil.copytree(models / "qwen3-export", work / name)
    (work / "megakd.lock").touch()
    shutil.copytree(models / "qwen2-export", out)
    before = content(tmp_path)
    assert main(["export", "--megatron", str(models / "qwen3-import"), "--out", str(out), "--overwrite"]) == 2
    assert content(tmp_path) == before
