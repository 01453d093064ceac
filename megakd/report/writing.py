"""Writes a report: the page, and its figures as PNG files in a folder beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from megakd.common.errors import UserError
from megakd.common.logging import log
from megakd.report.chart_png import save_bars, save_chart
from megakd.report.charts import build_charts
from megakd.report.page import report_page
from megakd.report.rank_times import rank_times
from megakd.report.runs import load_runs


def report_path(folders: Sequence[Path], output: Path | None) -> Path:
    """Where the page goes: `output`, or report.html in the run's folder, or for several runs here.

    Raises:
        UserError: `output` does not end in .html.
    """
    if output is None:
        return folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    if output.suffix != ".html":
        raise UserError(f"--output is {output}; it must end in .html. The figures go into a folder of the same name.")
    return output


def write_report(folders: Sequence[Path], output: Path | None = None, *, log_loss: bool = False) -> tuple[Path, Path]:
    """Report on runs that are over or going on.

    Args:
        folders: the runs' (run.output_dir).
        output: see report_path.
        log_loss: losses on logarithmic axes.

    Returns:
        (the page, the folder of its figures: the page's path without .html).

    Raises:
        UserError: a folder is no run's or has no metrics yet, a file cannot be read, or the report not be written.
    """
    page = report_path(folders, output)
    runs = load_runs(folders)
    for run in runs:
        for note in run.notes:
            log.warning(f"{run.label}: {note}")
    charts = build_charts(runs, log_loss=log_loss)
    figures = page.with_suffix("")
    times = [(run.label, rank_times(run)) for run in runs]
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(page, report_page(runs, charts))
        figures.mkdir(exist_ok=True)
        for chart in charts:
            save_chart(chart, figures / f"{chart.key}.png")
        if any(of_run for _, of_run in times):
            save_bars([pair for pair in times if pair[1]], figures / "step_time_by_rank.png")
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {error.filename or page} ({error.strerror}). Give another place with "
            "--output."
        ) from error
    return page, figures


def _write_whole(path: Path, text: str) -> None:
    """A page that somebody has open is replaced by a whole one."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".report-") as place:
        unnamed = Path(place) / path.name
        unnamed.write_text(text, encoding="utf-8", errors="replace")
        unnamed.replace(path)
