"""The page holds what the runs say, escaped, in well-formed HTML that needs nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megakd.common.step_parts import STEP_PARTS, seconds_key
from megakd.report.charts import build_charts
from megakd.report.page import report_page
from megakd.report.runs import RunData, load_runs
from tests.report.run_folders import evaluation, step, times, write_run

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags close in order, and keeps what a test asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[tuple[str, list[list[str]]]] = []
        self.row_classes: list[str] = []
        self.scripts: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append((found.get("class") or "", []))
        elif tag == "tr":
            self.tables[-1][1].append([])
            self.row_classes.append(found.get("class") or "")
        elif tag in ("td", "th"):
            self.tables[-1][1][-1].append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (self.open, tag)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.scripts[-1] += data
        elif "style" not in self.open:
            self.words += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][1][-1][-1] += data

    def rows(self, kind: str) -> list[dict[str, list[str]]]:
        """The tables of a class, each as cells by the row's heading."""
        return [{row[0]: row[1:] for row in rows} for name, rows in self.tables if name == kind]


def page_of(*folders: Path) -> tuple[Page, str]:
    runs = load_runs(folders)
    text = report_page(runs, build_charts(runs))
    return Page(text), text


def test_nothing_is_asked_of_a_network(tmp_path: Path) -> None:
    page, text = page_of(write_run(tmp_path / "a"), write_run(tmp_path / "b"))
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "base", "object", "embed")
        assert not {"src", "href", "srcset", "action", "background"} & set(attributes), (tag, attributes)
    assert not re.search(r"url\(|@import|https?:|fetch\(|XMLHttpRequest|WebSocket", text)
    policy = next(found["content"] for tag, found in page.tags if found.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")


def test_names_are_text_whatever_they_hold(tmp_path: Path) -> None:
    name = "</script><script>alert(1)</script>&\"'"
    folders = [write_run(tmp_path / "a", config={"run__name": name, "data__train": name}), write_run(tmp_path / "b")]
    page, text = page_of(*folders)
    assert "<script>alert" not in text
    assert name in page.words
    assert len(page.scripts) == 2
    json.loads(page.scripts[0])


def test_figures_for_the_script_are_the_records_(tmp_path: Path) -> None:
    steps = [step(1), step(2, loss=None, skipped=True), step(3)]
    page, _ = page_of(write_run(tmp_path / "a", steps=steps, evaluations=[]))
    figures = json.loads(page.scripts[0])
    (loss,) = figures["charts"]["loss"]
    assert figures["steps"][loss["x"]] == [1, 2, 3] and figures["last"] == 3
    assert loss["y"] == [3.0, None, pytest.approx(2.333)]
    teacher = figures["charts"]["step_time_1"][list(STEP_PARTS).index("teacher")]
    assert teacher["y"] == [0.2, 0.2, 0.2]
    keys = {found["data-key"] for tag, found in page.tags if tag == "figure"}
    assert keys == set(figures["charts"])
    values = [
        found for _, found in page.tags if (found.get("class") or "").startswith("value ") and "data-curve" in found
    ]
    assert len(values) == sum(len(curves) for curves in figures["charts"].values())


def drawn(page: Page, kind: str) -> list[str]:
    found = [attributes for tag, attributes in page.tags if tag == "path"]
    return [str(a["d"]) for a in found if str(a["class"]).split()[0] == kind]


def test_a_line_is_broken_where_there_is_no_figure(tmp_path: Path) -> None:
    norms = [1.0, None, 2.0, 3.0, None, 1.0]
    steps = [step(n + 1, grad_norm=norm) for n, norm in enumerate(norms)]
    page, _ = page_of(write_run(tmp_path / "a", steps=steps, evaluations=[]))
    keys = [str(found["data-key"]) for tag, found in page.tags if tag == "figure"]
    line = drawn(page, "line")[keys.index("grad_norm")]
    numbers = re.findall(r"([ML])(\d+) (\d+)", line)
    assert [move for move, _, _ in numbers] == ["M", "M", "L", "M"]
    assert [int(x) for _, x, _ in numbers] == [round(2000 * n / 6) for n in (1, 3, 4, 6)]
    heights = [int(y) for _, _, y in numbers]
    assert heights[0] == heights[3] and heights[2] < heights[1] < heights[0]  # up is less
    assert drawn(page, "lone") == ["".join(f"M{x} {y}h0" for _, x, y in (numbers[0], numbers[3]))]


def test_the_runs_side_by_side(tmp_path: Path) -> None:
    going_on = write_run(
        tmp_path / "a", steps=[step(1), step(2, skipped=True, grad_norm=None), step(3, loss_spike=True)]
    )
    page, _ = page_of(going_on, write_run(tmp_path / "b"))
    (facts,) = page.rows("facts")
    assert facts["steps"] == ["3 of 8, not finished", "8 of 8"]
    assert facts["loss at the end"] == ["2.333", "2.125"]
    assert facts["held-out KL to teacher, final"] == ["0.6111", "0.6111"]
    assert facts["held-out KL to teacher, best"] == ["0.6111 at step 8"] * 2
    assert facts["tokens/s, median"] == ["1,002", "1,004"]
    assert facts["peak memory"] == ["4 GiB"] * 2
    assert facts["skipped steps"] == ["1 (2)", "0"] and facts["loss spikes"] == ["1 (3)", "0"]
    assert facts["layout"] == ["TP 2 x PP 2 x DP 1"] * 2 and "git revision" not in facts


def test_evaluations_with_the_best_and_the_last_marked(tmp_path: Path) -> None:
    scored = [evaluation(0), evaluation(4, kl_to_teacher=0.1), evaluation(8)]
    page, _ = page_of(write_run(tmp_path / "a", evaluations=scored))
    table = page.rows("figures")[-1]
    assert list(table) == ["step", "0", "4 best", "8 final"]
    assert table["4 best"][2] == "0.1" and table["step"][2] == "KL to teacher"
    by_agreement = write_run(tmp_path / "b", evaluations=scored, config={"evaluation__metric": "agreement"})
    assert list(page_of(by_agreement)[0].rows("figures")[-1]) == ["step", "0", "4", "8 best final"]


def test_evaluations_without_a_teacher_or_none_at_all(tmp_path: Path) -> None:
    alone = dict.fromkeys(("kl_to_teacher", "agreement", "teacher_cross_entropy"))
    page, _ = page_of(write_run(tmp_path / "a", evaluations=[evaluation(4, **alone), evaluation(8, **alone)]))
    assert page.rows("figures")[-1]["step"] == ["cross-entropy", "perplexity"]
    assert "8 best final" in page.rows("figures")[-1]
    page, _ = page_of(write_run(tmp_path / "b", evaluations=[]))
    assert "No evaluations." in page.words


def test_of_many_evaluations_the_newest_the_first_and_the_best(tmp_path: Path) -> None:
    scored = [evaluation(n) for n in range(1, 201)]
    scored[20]["kl_to_teacher"] = 0.0
    page, _ = page_of(write_run(tmp_path / "a", evaluations=scored))
    table = page.rows("figures")[-1]
    assert list(table)[:4] == ["step", "1", "21 best", "141"] and list(table)[-1] == "200 final"
    assert "138 older evaluations are in evaluations.jsonl." in page.words


def test_settings_that_differ_are_marked(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", config={"run__seed": 2, "data__train": None})]
    page, _ = page_of(*folders)
    different, everything = page.rows("settings")
    assert different == {
        "setting": ["a", "b"], "run.name": ["a", "b"], "run.seed": ["1", "2"],
        "data.train": ["path data/train; weight null", "null"],
    }  # fmt: skip
    assert everything["distill.kd_weight"] == ["1.0", "1.0"] and set(different) < set(everything)
    assert page.row_classes.count("differs") == 3
    (alone,) = page_of(folders[0])[0].rows("settings")
    assert alone["run.seed"] == ["1"] and alone["schedule.train_steps"] == ["8"]
    again = write_run(tmp_path / "c" / "a")
    assert "No setting differs." in page_of(folders[0], again)[0].words


def test_bars_and_shares_of_the_ranks(tmp_path: Path) -> None:
    page, _ = page_of(write_run(tmp_path / "a"))
    widths = [float(re.findall(r"[\d.]+", str(a["style"]))[0]) for t, a in page.tags if t == "i" and "style" in a]
    parts = len(STEP_PARTS)
    by_rank = [sum(widths[rank * parts : (rank + 1) * parts]) for rank in range(4)]
    assert by_rank == pytest.approx([25, 50, 75, 100], abs=0.01)
    shares = page.rows("figures")[0]
    assert shares["teacher"] == ["500", "36.2%", "200", "800"]


def test_a_report_without_figures_or_settings_is_a_page(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    page, _ = page_of(folder)
    assert "There is no config.yaml." in page.words and page.rows("facts")[0]["steps"] == ["1"]


def long_run(number: int, count: int = 100_000) -> RunData:
    draw = np.random.default_rng(number)
    keys = ["loss", "kd_loss", "ce_loss", "grad_norm", "learning_rate", "tokens_per_second", "memory_bytes"]
    columns = {key: draw.random(count) for key in [*keys, *map(seconds_key, STEP_PARTS)]}
    scored: list[dict[str, Any]] = [evaluation(n) for n in range(0, count, 100)]
    return RunData(
        Path(f"r{number}"), f"r{number}", np.arange(1, count + 1), columns, {"skipped": [], "loss_spike": []}, scored,
        [times(count, 10, ranks=32)],
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 4, 20])
def test_long_runs_make_no_large_page(count: int) -> None:
    one = long_run(0)
    runs = [one, *(RunData(**vars(one) | {"label": f"r{n}"}) for n in range(1, count))]
    assert len(report_page(runs, build_charts(runs)).encode()) < 2_000_000
