"""configs/slurm/train.sbatch under a srun and a scontrol that only tell what they were called with."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.training.slurm import SCRIPT, fake_slurm


def run(tmp_path: Path, status: int, *arguments: str, **variables: str) -> tuple[int, str, list[str]]:
    """The script's status, its standard error, and the calls, where srun ends with `status`."""
    fake_slurm(tmp_path, srun=f'echo "srun $*" >>"$FAKE_SLURM/calls"; exit {status}')
    ended = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        cwd=SCRIPT.parents[2],
        env={
            **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE_SLURM": str(tmp_path), "SLURM_JOB_ID": "7",
            "SLURM_CPUS_PER_TASK": "64", **variables,
        },
        capture_output=True,
        text=True,
        timeout=60,
    )  # fmt: skip
    calls = tmp_path / "calls"
    return ended.returncode, ended.stderr, calls.read_text().splitlines() if calls.exists() else []


SRUN = "srun --ntasks-per-node=1 --cpus-per-task=64 ./launch.sh train my.yaml optimizer.lr=1e-4 --max-restarts 3"
ARGUMENTS = ("my.yaml", "optimizer.lr=1e-4", "--max-restarts", "3")


@pytest.mark.parametrize("status", [0, 1, 2, 137])
def test_what_has_ended_is_not_put_into_the_queue_again(tmp_path: Path, status: int) -> None:
    assert run(tmp_path, status, *ARGUMENTS) == (status, "", [SRUN])


@pytest.mark.parametrize("count", ["", "1", "99"])
def test_what_wants_to_be_started_again_is(tmp_path: Path, count: str) -> None:
    assert run(tmp_path, 75, *ARGUMENTS, SLURM_RESTART_COUNT=count) == (75, "", [SRUN, "scontrol requeue 7"])


def test_but_not_for_ever(tmp_path: Path) -> None:
    status, errors, calls = run(tmp_path, 75, *ARGUMENTS, SLURM_RESTART_COUNT="3", MEGAKD_MOST_REQUEUES="3")
    assert (status, calls) == (75, [SRUN])
    assert errors == "job 7 was put into the queue again 3 times, which is MEGAKD_MOST_REQUEUES; it ends\n"


@pytest.mark.parametrize("most", ["often", "-1", "1.5", "3 times", "08", "1e3", "9" * 20, "x[$(id>calls)]"])
def test_how_often_must_be_a_number(tmp_path: Path, most: str) -> None:
    status, errors, calls = run(tmp_path, 75, *ARGUMENTS, MEGAKD_MOST_REQUEUES=most)
    assert (status, calls) == (2, [])
    assert errors == f"error: MEGAKD_MOST_REQUEUES is '{most}'; it must be a whole number, such as 100\n"


def test_never_again(tmp_path: Path) -> None:
    status, errors, calls = run(tmp_path, 75, *ARGUMENTS, MEGAKD_MOST_REQUEUES="0")
    assert (status, calls) == (75, [SRUN]) and "put into the queue again 0 times" in errors


def test_without_a_file_it_says_how_it_is_submitted(tmp_path: Path) -> None:
    status, errors, calls = run(tmp_path, 0)
    assert (status, calls) == (2, [])
    assert errors == "error: submit this from the clone of megakd: sbatch configs/slurm/train.sbatch my.yaml\n"


def test_sbatch_reads_every_option() -> None:
    """It stops at the first line that is neither empty nor a comment."""
    lines = SCRIPT.read_text().splitlines()
    options = [index for index, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert len(options) == 10
    assert all(line.startswith("#") or not line for line in lines[: options[-1]])
    assert lines[0] == "#!/bin/bash"


def test_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")
