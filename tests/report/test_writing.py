"""The command: where a report goes, and what keeps it from being written."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.image import imread

from megakd.cli.main import main
from tests.report.run_folders import write_run


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.png")}


def test_one_run_s_report_is_in_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "a")
    assert main(["report", str(folder)]) == 0
    page, figures = folder / "report.html", folder / "report"
    assert capsys.readouterr().out.splitlines() == [f"report: {page}", f"figures: {figures}/*.png"]
    assert page.read_text().startswith("<!doctype html>")
    assert written(figures) == {
        "loss.png", "kd_loss.png", "ce_loss.png", "kl_to_teacher.png", "cross_entropy.png", "agreement.png",
        "grad_norm.png", "learning_rate.png", "tokens_per_second.png", "memory_bytes.png", "step_time_1.png",
        "step_time_by_rank.png",
    }  # fmt: skip
    for name in written(figures):
        picture = imread(figures / name)
        assert picture.shape[1] == 1200 and picture[..., :3].std() > 0.01, name
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    assert main(["report", str(folder)]) == 0  # once more, over the first


def test_several_runs_report_is_here_or_where_it_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Underscores and dollars are no mathematics.
    folders = [write_run(tmp_path / name, config={"run__name": "$x_1$"}) for name in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    assert main(["report", *map(str, folders), "--log-loss"]) == 0
    assert (tmp_path / "report.html").exists() and "step_time_2.png" in written(tmp_path / "report")
    assert "logarithmic" in (tmp_path / "report.html").read_text()
    assert main(["report", *map(str, folders), "--output", "new/both.html"]) == 0
    assert (tmp_path / "new" / "both.html").exists() and written(tmp_path / "new" / "both")
    assert capsys.readouterr().out.splitlines()[-2:] == ["report: new/both.html", "figures: new/both/*.png"]


def test_a_report_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "a")
    assert main(["report", str(folder), "--output", "report.pdf"]) == 2
    assert capsys.readouterr().err.startswith("error: --output is report.pdf; it must end in .html.")
    assert main(["report", str(folder), "--output", f"{folder}/run.json/x.html"]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: the report cannot be written to {folder}/run.json") and line.count("\n") == 1
    (folder / "report").write_text("in the way")
    assert main(["report", str(folder)]) == 2
    assert "cannot be written to" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/nowhere does not exist; give a run's folder")
