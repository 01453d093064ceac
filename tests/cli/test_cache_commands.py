"""The commands around a teacher cache, as a user types them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megakd.cli.main import main
from tests.cache.caches import write as write_known
from tests.training.runs import SEQUENCE, layout, run_values, write_run_files


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run_files(tmp_path_factory.mktemp("files"), samples=40)
    values = run_values(folder, distill__ce_weight=0.0, run__export=False, **layout(2))
    (folder / "x.yaml").write_text(yaml.safe_dump(values))
    return folder / "x.yaml"


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "megakd", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300)


def test_from_the_dry_run_to_a_student(file: Path) -> None:
    cache = file.parent / "run" / "teacher_cache"
    tried = command("cache", file, "--dry-run")
    assert tried.returncode == 0, tried.stderr
    assert "dry run on 32 of 40 samples: " in tried.stdout and "nothing was written" in tried.stdout
    assert not cache.exists()
    written = command("cache", file)
    assert written.returncode == 0, written.stderr
    assert f"40 samples, {40 * SEQUENCE} tokens" in written.stdout
    assert f"teacher.source=cache teacher.path={cache}" in written.stdout
    again = command("cache", file)
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1].startswith(f"error: {cache} is a complete cache. Train from it (")
    trained = command("train", file, "teacher.source=cache", f"teacher.path={cache}")
    assert trained.returncode == 0, trained.stderr
    assert f"teacher from the cache {cache}: mode sampled" in trained.stdout and "step 4/4" in trained.stdout
    run = file.parent / "run"
    assert trained.stdout.splitlines()[-1] == f"how it went: ./launch.sh report {run}"
    assert main(["report", str(run)]) == 0 and (run / "report.html").exists()
    checked = command("verify-cache", cache)
    assert checked.returncode == 0 and checked.stdout.endswith("all is well\n")


def test_inspection_of_a_cache_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_known(tmp_path / "c", [0, 3, 5])
    assert main(["inspect-cache", str(tmp_path / "c"), "--sample", "3", "--positions", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "mode sampled, vocab_size 50, num_samples 4" in lines[1]
    assert "sample 3: 12 of 12 positions stored" in lines
    assert sum(line.startswith("  position ") for line in lines) == 2


@pytest.mark.parametrize("name", ["inspect-cache", "verify-cache"])
def test_what_is_no_cache(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, str(tmp_path)]) == 2
    assert capsys.readouterr().err == (f"error: {tmp_path} is no teacher cache: manifest.json does not exist.\n")


def test_a_damaged_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_known(tmp_path / "c", [0, 3, 5])
    shard = tmp_path / "c" / "shard-000000.bin"
    content = bytearray(shard.read_bytes())
    content[70] ^= 1
    shard.write_bytes(content)
    assert main(["verify-cache", str(tmp_path / "c")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"{shard}: sample 0 is damaged") and lines[-1].startswith("error: ")
    assert main(["inspect-cache", str(tmp_path / "c"), "--sample", "4"]) == 2
    assert "has no sample 4" in capsys.readouterr().err
