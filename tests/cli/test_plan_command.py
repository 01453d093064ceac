"""`megakd plan` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megakd.cli.main import main
from tests.training.runs import save_llama


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, hidden in (("small", 32), ("large", 64)):
        save_llama(folder / name, seed=1, hidden_size=hidden, intermediate_size=96)
        for file in (folder / name).iterdir():
            if file.name != "config.json":
                file.unlink()
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({
        "run": {"output_dir": "runs/x"},
        "student": {"init": {"path": "models/small"}},
        "teacher": {"path": "models/large"},
        "parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        "data": {"train": "data", "sequence_length": 64, "micro_batch_size": 1, "global_batch_size": 8},
        "optimizer": {"lr": 1e-3},
        "schedule": {"train_steps": 100},
    }))  # fmt: skip
    return path


def test_a_plan_needs_neither_weights_nor_data(config, shapes, capsys):
    assert main(["plan", str(config), "--cluster", "h100", "--nproc-per-node", "4", "--models", str(shapes)]) == 0
    text = capsys.readouterr().out
    assert f"teacher.path: models/large is not here; its shape is taken from {shapes / 'large'}" in text
    assert "1 node of 4 x NVIDIA H100 SXM 80 GB (h100): 4 ranks, TP 2 x PP 2 x DP 1" in text
    for part in ("weights", "gradients", "optimizer", "teacher", "signals", "activations", "loss"):
        assert part in text
    assert "fits: at most" in text and "MFU" in text and "the run's 100 steps take" in text


def test_json_holds_the_same(config, shapes, capsys):
    command = ["plan", str(config), "--cluster", "h100", "--models", str(shapes), "--json"]
    assert main([*command, "--nnodes", "2", "--price-per-gpu-hour", "5"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["ranks"] == 16 and figures["nodes"] == 2 and figures["fits"] is True
    assert len(figures["stages"]) == 2 and figures["cluster"]["price_per_gpu_hour"] == 5
    assert figures["peak_bytes"] == max(stage["peak_bytes"] for stage in figures["stages"])
    assert figures["step"]["tokens"] == 8 * 64


def test_what_does_not_fit_ends_with_status_1(config, shapes, tmp_path, capsys):
    cluster = tmp_path / "tiny.yaml"
    cluster.write_text("{memory_gib: 0.0001, bf16_tflops: 1, fp32_tflops: 1, memory_gb_per_s: 1, link_gb_per_s: 1, "
                       "network_gb_per_s: 1}")  # fmt: skip
    command = ["plan", str(config), "--cluster", str(cluster), "--models", str(shapes)]
    assert main(command) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert main([*command, "--sweep"]) == 1
    assert "no layout fits on these ranks" in capsys.readouterr().out


def test_a_sweep_prints_what_to_set(config, shapes, capsys):
    command = ["plan", str(config), "--cluster", "h100", "--nproc-per-node", "4", "--models", str(shapes), "--sweep"]
    assert main([*command, "--top", "2"]) == 0
    text = capsys.readouterr().out
    assert "the first: parallel.tensor_model_parallel_size=" in text and "more (--top)" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cluster", "h1000"], "--cluster is 'h1000'"),
        (["--cluster", "h100", "--nnodes", "0"], "--nnodes is 0; it must be at least 1."),
        (["--cluster", "h100", "--top", "3"], "--top is 3 and has no effect without --sweep."),
        (["--cluster", "h100", "--nproc-per-node", "3"], "the run has 6 ranks; there must be a multiple of"),
        (["--cluster", "h100", "--cache", "--sweep"], "--cache and --sweep are both given"),
        (["--cluster", "h100", "--cache", "distill.loss=reverse_kl"], "only forward_kl can be had"),
        (["--cluster", "h100", "--cache", "teacher.source=cache"], "a cache is written from a teacher"),
        (["--cluster", "h100", "--price-per-gpu-hour", "-1"], "--price-per-gpu-hour is -1; it must be at least 0."),
        (["--cluster", "h100", "--models", "nowhere"], "--models is nowhere"),
        (["--cluster", "h100", "teacher.path=models/other"], "teacher.path is models/other; there is no such folder"),
        (["--cluster", "h100", "parallel.tensor_model_parallel_size=3"], "multiple of tensor_model_parallel_size 3"),
    ],
)
def test_bad_input_is_one_line(config, shapes, capsys, options, message):
    models = [] if "--models" in options else ["--models", str(shapes)]
    assert main(["plan", str(config), *models, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_fewest_nodes_hold_a_replica_of_each_model(config, shapes, capsys):
    command = ["plan", str(config), "--cluster", "h100", "--nproc-per-node", "4", "--models", str(shapes), "--json"]
    assert main([*command, "teacher.placement=dedicated", "teacher.ranks=4"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"] == 8
    # Both models on the same ranks: the wider one counts.
    assert main([*command, "teacher.parallel.pipeline_model_parallel_size=4"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"] == 8


def test_a_teacher_on_ranks_of_its_own_has_its_rows_and_its_waits(config, shapes, capsys):
    command = ["plan", str(config), "--cluster", "h100", "--nproc-per-node", "4", "--models", str(shapes)]
    placed = ["teacher.placement=dedicated", "teacher.ranks=4", "teacher.signal_window=2"]
    assert main([*command, *placed]) == 0
    text = capsys.readouterr().out
    assert "8 ranks, the first 4 the student's (TP 2 x PP 2 x DP 1), 4 the teacher's" in text
    assert text.count("\nteacher 0 ") == text.count("\nteacher 1 ") == 2
    assert "4 windows of 2 microbatches cost" in text and "teacher's states, student's tensor ranks" in text
    assert text.count("s of it for the") == 1 and "teacher's 4 ranks wait" in text
    assert main([*command, *placed, "teacher.prefetch_steps=0"]) == 0
    text = capsys.readouterr().out
    assert "the student's 4 ranks wait" in text and "the teacher's 4 ranks wait" in text
    assert "which is not ahead (teacher.prefetch_steps 0)" in text


def test_a_sweep_says_once_why_layouts_are_not_possible(config, shapes, capsys):
    command = ["plan", str(config), "--cluster", "h100", "--models", str(shapes), "--sweep"]
    assert main([*command, "--nnodes", "4", "data.global_batch_size=3"]) == 1
    text = capsys.readouterr().out
    assert "no layout is possible on these ranks" in text and "MFU" not in text
    lines = text[text.index("not possible:") :].splitlines()[1:]
    assert len(lines) < 6 and any(" more: " in line for line in lines)
    assert main([*command, "--nnodes", "2", "teacher.placement=dedicated", "teacher.ranks=8"]) == 0
    text = capsys.readouterr().out
    assert "teacher's layout" in text and " teacher.parallel.tensor_model_parallel_size=" in text


def test_small_sizes_are_not_nothing(config, shapes, capsys):
    command = ["plan", str(config), "--cluster", "h100", "--nproc-per-node", "4", "--models", str(shapes), "--sweep"]
    assert main(command) == 0
    assert " MiB " in capsys.readouterr().out


def test_the_writing_of_a_cache_is_planned_without_the_student(config, shapes, capsys):
    own = "teacher.parallel.tensor_model_parallel_size=1"
    command = ["plan", str(config), own, "--cluster", "h100", "--models", str(shapes), "--cache"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "8 ranks, TP 1 x PP 2 x DP 4" in text and "the teacher alone, of" in text
    assert "optimizer" not in text and "gradients" not in text
    assert main([*command, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["fits"] is True and figures["window"]["tokens"] == 8 * 64 * 4
    assert figures["peak_bytes"] == max(stage["peak_bytes"] for stage in figures["stages"])
