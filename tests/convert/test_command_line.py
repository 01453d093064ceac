"""tools/convert_checkpoint.py: what its commands print, the status they end with, and what they leave behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.convert.family_models import MODELS, save_model
from tests.convert.test_exporting import assert_same_weights
from tools.convert_checkpoint import main

ROOT = Path(__file__).resolve().parents[2]
# A run of the command that stops where it has written a few pieces, tells so, and waits to be ended.
WAITING = """
import signal, sys, time
from pathlib import Path
from megakd.convert import {module}
# A shell's background jobs, pytest among them, ignore it, and so do their children.
signal.signal(signal.SIGINT, signal.{on_sigint})
from tools.convert_checkpoint import main
written = []
def wait(count):
    written.append(count)
    if len(written) == 5:
        print("writing", flush=True)
        time.sleep(100)
convert = {module}.{function}
{module}.{function} = lambda *args, **kwargs: convert(*args, **(kwargs | {{"begin": lambda total: wait}}))
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """A command leaves the process's handlers as they were."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder in `hf` and its import in `megatron`."""
    save_model(tmp_path / "hf", "qwen2", torch.bfloat16)
    assert main(["import", "--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "megatron")]) == 0
    return tmp_path


def entries(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def edit_config(path: Path, **changes: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_there_and_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, megatron, out = (str(folder / name) for name in ("hf", "megatron", "out"))
    assert main(["import", "--hf", hf, "--out", megatron, "--overwrite"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Megatron checkpoint: {megatron}"
    assert main(["export", "--megatron", megatron, "--out", out]) == 0
    assert capsys.readouterr() == (
        f"{megatron} has no tokenizer files; {out} is written without.\nHugging Face folder: {out}\n",
        "",
    )
    assert_same_weights(Path(out), Path(hf))
    assert main(["verify", "--hf", out, "--megatron", megatron, "--weights-only"]) == 0
    assert capsys.readouterr().out == "31 of 31 parameters are equal bit for bit\nthe same\n"


def test_other_layout_type_and_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, megatron = str(folder / "hf"), str(folder / "megatron")
    arguments = ["import", "--hf", hf, "--out", megatron, "--tp", "2", "--pp", "4", "--dtype", "fp32", "--overwrite"]
    assert main(arguments) == 0
    capsys.readouterr()
    assert main(["verify", "--hf", hf, "--megatron", megatron, "--weights-only"]) == 0
    assert capsys.readouterr().out == (
        "31 of 31 parameters have equal values; 31 are stored as another type\nthe same\n"
    )
    assert main(["inspect", megatron]) == 0
    told = capsys.readouterr().out
    assert f"{megatron}: Megatron checkpoint (torch_dist)\nfamily: qwen2 (Qwen2ForCausalLM)\n" in told
    assert "in fp32," in told and "  embedding.word_embeddings.weight" in told and "[131, 64]" in told
    assert main(["inspect", hf]) == 0
    other = capsys.readouterr().out.splitlines()
    assert other[0] == f"{hf}: Hugging Face folder (safetensors)"
    assert other[3:] == told.replace("fp32", "bf16").splitlines()[3:]


def test_as_a_program(folder: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py")]
    hf, megatron = str(folder / "hf"), str(folder / "megatron")
    done = subprocess.run(
        [*command, "verify", "--hf", hf, "--megatron", megatron], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "31 of 31 parameters are equal bit for bit"
    assert lines[1].startswith("logits of 2 x 64 tokens differ by at most ") and float(lines[1].split()[-1]) < 1e-4
    assert lines[2:] == ["the same"]


@pytest.mark.parametrize("name", MODELS)
def test_every_family_verifies(tmp_path: Path, name: str) -> None:
    hf, megatron = str(tmp_path / "hf"), str(tmp_path / "megatron")
    save_model(tmp_path / "hf", name)
    assert main(["import", "--hf", hf, "--out", megatron]) == 0
    assert main(["verify", "--hf", hf, "--megatron", megatron]) == 0


class TestVerify:
    """A change of one weight, and what is made of it."""

    def changed(self, folder: Path, by: float) -> list[str]:
        def change(weights: dict[str, torch.Tensor]) -> None:
            weights["model.layers.2.mlp.down_proj.weight"][5, 7] = 1.0 + by
            weights["model.layers.2.mlp.down_proj.weight"][5, 8] = 1.0

        def base(weights: dict[str, torch.Tensor]) -> None:
            weights["model.layers.2.mlp.down_proj.weight"][5, 7:9] = 1.0

        edit_weights(folder / "hf", base)
        arguments = ["--hf", str(folder / "hf"), "--megatron", str(folder / "megatron")]
        assert main(["import", "--hf", str(folder / "hf"), "--out", str(folder / "megatron"), "--overwrite"]) == 0
        edit_weights(folder / "hf", change)
        return ["verify", *arguments]

    def test_a_changed_weight(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = self.changed(folder, 0.5)
        capsys.readouterr()
        assert main(arguments) == 1
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "30 of 31 parameters are equal bit for bit"
        assert lines[1] == (
            "  decoder.layers.2.mlp.linear_fc2.weight: 1 of 6,144 elements differ, by at most 5.000e-01"
        )
        assert lines[2].startswith("logits of 2 x 64 tokens differ by at most ") and float(lines[2].split()[-1]) > 1e-4
        assert lines[3] == "different"

    def test_within_the_tolerance(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = [*self.changed(folder, 2**-7), "--logits-tolerance", "1"]
        assert main(arguments) == 1
        assert main([*arguments, "--tolerance", "0.001"]) == 1
        capsys.readouterr()
        assert main([*arguments, "--tolerance", "0.01"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "the same within the tolerance"

    def test_not_a_number_is_within_no_tolerance(self, folder: Path) -> None:
        arguments = self.changed(folder, float("nan"))
        assert main([*arguments, "--weights-only", "--tolerance", "1e9"]) == 1

    @pytest.mark.parametrize("tolerance", ["nan", "-1", "inf", "much"])
    def test_a_tolerance_that_would_pass_everything(
        self, folder: Path, tolerance: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hf, megatron = str(folder / "hf"), str(folder / "megatron")
        message = f"argument --tolerance: {tolerance} is not a number from 0"
        arguments = ["verify", "--hf", hf, "--megatron", megatron, f"--tolerance={tolerance}"]
        assert_refused(arguments, message, folder, capsys)

    def test_different_models(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        save_model(folder / "other", "qwen2_tied")
        assert main(["verify", "--hf", str(folder / "other"), "--megatron", str(folder / "megatron")]) == 2
        assert "share_embeddings_and_output_weights is True in" in capsys.readouterr().err


def test_code_in_the_folder_does_not_run(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    marker, hf = folder / "marker", folder / "hf"
    code = f"open({str(marker)!r}, 'w')\n"
    for name in ("configuration_mine", "modeling_mine", "tokenization_mine"):
        (hf / f"{name}.py").write_text(code)
    (hf / "custom_generate").mkdir()
    (hf / "custom_generate" / "generate.py").write_text(code + "def generate(*args, **kwargs): pass\n")
    classes = {"AutoConfig": "configuration_mine.C", "AutoModelForCausalLM": "modeling_mine.Qwen2ForCausalLM"}
    kernel = {"_attn_implementation": "someone/code", "attn_implementation": "someone/code"}
    edit_config(hf, auto_map=classes | {"AutoTokenizer": "tokenization_mine.T"}, **kernel)
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("nobody is asked"))
    assert main(["import", "--hf", str(hf), "--out", str(folder / "again")]) == 0
    assert main(["export", "--megatron", str(folder / "again"), "--out", str(folder / "out")]) == 0
    assert main(["inspect", str(hf)]) == 0
    assert main(["verify", "--hf", str(hf), "--megatron", str(folder / "again")]) == 0
    assert not marker.exists()
    # transformers would not find the classes beside an export.
    assert "auto_map" not in json.loads((folder / "out" / "config.json").read_text())
    assert not list((folder / "out").rglob("*.py"))


def truncate(folder: Path) -> None:
    file = folder / "hf" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def name_a_missing_shard(folder: Path) -> None:
    weights = load_file(folder / "hf" / "model.safetensors")
    (folder / "hf" / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00002.safetensors")}
    (folder / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))


def only_pickles(folder: Path) -> None:
    (folder / "hf" / "model.safetensors").rename(folder / "hf" / "pytorch_model.bin")


def break_a_tensor_file(folder: Path) -> None:
    for file in (folder / "megatron" / "release").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])


def lose_a_tensor_file(folder: Path) -> None:
    for file in (folder / "megatron" / "release").glob("*.distcp"):
        file.unlink()


def break_the_metadata(folder: Path) -> None:
    file = folder / "megatron" / "release" / ".metadata"
    file.write_bytes(file.read_bytes()[:-200])


def transpose_a_weight(folder: Path) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder / "hf", lambda weights: weights.update({key: weights[key].T.contiguous()}))


# What is done to the folders, and what the commands that read them say.
BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "model.safetensors is not a whole safetensors file"),
    "missing_shard": (name_a_missing_shard, "in model-00001-of-00002.safetensors, which is not in the folder."),
    "misshapen": (transpose_a_weight, "up_proj.weight in HF has the shape [64, 96]; config.json means [96, 64]."),
    "pickled": (only_pickles, "holds pickled weights only (pytorch_model.bin), which can run code when loaded"),
    "unknown": (lambda folder: edit_config(folder / "hf", model_type="mamba"), "mamba"),
    "no_config": (lambda folder: (folder / "hf" / "config.json").unlink(), "has no config.json"),
    "config_not_json": (lambda folder: (folder / "hf" / "config.json").write_text("{"), "is not JSON"),
    "config_not_text": (lambda folder: (folder / "hf" / "config.json").write_bytes(b"\xff\xfe{"), "is not JSON"),
}
BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (break_a_tensor_file, "cannot be read"),
    "file_gone": (lose_a_tensor_file, "cannot be read"),
    "metadata": (break_the_metadata, ".metadata is damaged"),
    "no_config": (
        lambda folder: (folder / "megatron" / "config.json").unlink(),
        "MEGATRON has no config.json, which says what model it is. Copy the model's there",
    ),
    "another_config": (
        lambda folder: edit_config(folder / "megatron", intermediate_size=128),
        "linear_fc1.weight in MEGATRON has the shape [4, 192, 64]; config.json means [4, 256, 64].",
    ),
    "tracker": (
        lambda folder: (folder / "megatron" / "latest_checkpointed_iteration.txt").write_text("17"),
        "holds no checkpoint in torch_dist format",
    ),
    "tracker_not_text": (
        lambda folder: (folder / "megatron" / "latest_checkpointed_iteration.txt").write_text("²"),
        "latest_checkpointed_iteration.txt says '²'; it must be an iteration or release.",
    ),
}


def assert_refused(arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = entries(folder)
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and said.err.endswith("\n")
    where = {"HF": str(folder / "hf"), "MEGATRON": str(folder / "megatron")}
    for word, path in where.items():
        message = message.replace(word, path)
    assert message in said.err
    assert entries(folder) == before


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_bad_folder(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = BAD_FOLDERS[name]
    change(folder)
    hf = str(folder / "hf")
    for arguments in (
        ["import", "--hf", hf, "--out", str(folder / "out")],
        ["verify", "--hf", hf, "--megatron", str(folder / "megatron")],
        ["inspect", hf],
    ):
        assert_refused(arguments, message, folder, capsys)


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_a_bad_checkpoint(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = BAD_CHECKPOINTS[name]
    change(folder)
    megatron = str(folder / "megatron")
    assert_refused(["export", "--megatron", megatron, "--out", str(folder / "out")], message, folder, capsys)
    assert_refused(["verify", "--hf", str(folder / "hf"), "--megatron", megatron], message, folder, capsys)
    if message != "cannot be read":
        # It reads headers only.
        assert_refused(["inspect", megatron], message, folder, capsys)


def test_bad_paths(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, megatron, nowhere = (str(folder / name) for name in ("hf", "megatron", "nowhere"))
    for arguments, message in (
        (["import", "--hf", nowhere, "--out", str(folder / "out")], nowhere),
        (["import", "--hf", hf, "--out", megatron], "MEGATRON exists. Name another path, or give --overwrite"),
        (["import", "--hf", hf, "--out", hf, "--overwrite"], "HF is where the model comes from"),
        (["import", "--hf", hf, "--out", f"{hf}/config.json/out"], "out lies in HF, where the model comes from."),
        (["import", "--hf", hf, "--out", f"{megatron}/config.json/out"], "could not be written: Not a directory."),
        (["import", "--hf", hf, "--out", f"{hf}/config.json"], "config.json lies in HF"),
        (["import", "--hf", hf, "--out", f"{megatron}/config.json"], "exists and is not a folder. Name another"),
        (["import", "--hf", hf, "--out", ""], "The output's path is empty. Name the folder to write."),
        (["export", "--megatron", megatron, "--out", str(folder), "--overwrite"], "holds MEGATRON, where the model"),
        (["export", "--megatron", megatron, "--hf-config", hf, "--out", hf, "--overwrite"], "HF is where the model"),
        (["import", "--hf", hf, "--out", str(folder / "out"), "--tp", "3"], "--tp is 3; it must divide"),
        (["import", "--hf", megatron, "--out", str(folder / "out")], "MEGATRON has neither model.safetensors nor"),
        (["export", "--megatron", nowhere, "--out", str(folder / "out")], "nowhere holds no checkpoint"),
        (["export", "--megatron", hf, "--out", str(folder / "out")], "HF holds no checkpoint in torch_dist format"),
        (["export", "--megatron", megatron, "--out", hf], "HF exists. Name another path, or give --overwrite"),
        (["verify", "--hf", hf, "--megatron", hf], "HF holds no checkpoint in torch_dist format"),
        (["inspect", nowhere], "nowhere is not a folder"),
        (["inspect", f"{hf}/config.json"], "config.json is not a folder"),
    ):
        assert_refused(arguments, message, folder, capsys)


@pytest.mark.parametrize(
    ("sent", "on_sigint"),
    [(signal.SIGTERM, "default_int_handler"), (signal.SIGTERM, "SIG_IGN"), (signal.SIGINT, "default_int_handler")],
)
@pytest.mark.parametrize("command", ["import", "export"])
def test_an_interrupt_leaves_nothing(folder: Path, command: str, sent: signal.Signals, on_sigint: str) -> None:
    module, function = {
        "import": ("importing", "import_checkpoint"), "export": ("exporting", "export_checkpoint"),
    }[command]  # fmt: skip
    source = {"import": ["--hf", str(folder / "hf")], "export": ["--megatron", str(folder / "megatron")]}[command]
    program = WAITING.format(module=module, function=function, on_sigint=on_sigint)
    before = entries(folder)
    process = subprocess.Popen(
        [sys.executable, "-c", program, command, *source, "--out", str(folder / "new" / "out")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert entries(folder / "new") == [".out.tmp"]
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted: nothing was written\n")
    assert entries(folder) == before


@pytest.mark.parametrize("replacing", [False, True])
def test_an_interrupt_that_comes_too_late_says_so(
    folder: Path, replacing: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        renamed = rename(self, target)
        if self.name == "new":
            raise KeyboardInterrupt
        return renamed

    out = folder / ("megatron" if replacing else "out")
    monkeypatch.setattr(Path, "rename", interrupted)
    capsys.readouterr()
    assert main(["import", "--hf", str(folder / "hf"), "--out", str(out), "--overwrite"]) == 130
    assert capsys.readouterr().err == f"interrupted: {out} was complete already\n"
    assert entries(folder) == sorted({"hf", "megatron", out.name})
    assert main(["verify", "--hf", str(folder / "hf"), "--megatron", str(out), "--weights-only"]) == 0


def test_an_interrupt_while_replacing_keeps_the_earlier_conversion(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    before = (folder / "megatron" / "release" / ".metadata").read_bytes()
    monkeypatch.setattr(Path, "rename", interrupted)
    arguments = ["import", "--hf", str(folder / "hf"), "--out", str(folder / "megatron"), "--overwrite"]
    assert main(arguments) == 130
    assert capsys.readouterr().err == "interrupted: nothing was written\n"
    assert entries(folder) == ["hf", "megatron"]
    assert (folder / "megatron" / "release" / ".metadata").read_bytes() == before


# What argparse refuses.
BAD_ARGUMENTS = {
    "--tp 0": "argument --tp: 0 is not a whole number above 0. ",
    "--tp -1": "argument --tp: ",
    "--pp x": "argument --pp: x is not a whole number above 0. ",
    "--dtype int8": "argument --dtype: invalid choice: 'int8'",
    "--nothing": "unrecognized arguments: --nothing. ",
}


@pytest.mark.parametrize("extra", BAD_ARGUMENTS)
def test_bad_arguments_are_one_line(folder: Path, extra: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["import", "--hf", str(folder / "hf"), "--out", str(folder / "out"), *extra.split()]
    assert_refused(arguments, BAD_ARGUMENTS[extra], folder, capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND. "),
        (["convert"], "argument COMMAND: invalid choice: 'convert'"),
        (["import", "--out", "x"], "the following arguments are required: --hf. "),
    ],
)
def test_lacking_arguments_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(arguments, message, tmp_path, capsys)
