"""Hugging Face folder -> Megatron checkpoint -> Hugging Face folder, on one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megakd.common.errors import UserError
from megakd.convert import architecture_from_hf, importing
from megakd.convert.exporting import export_checkpoint
from megakd.convert.hf_weights import HFWeights
from megakd.convert.importing import import_checkpoint
from megakd.convert.megatron_weights import MegatronWeights
from megakd.parameters.shapes import parameter_shapes
from tests.convert.family_models import MODELS, save_model
from tests.convert.test_exporting import assert_same_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_exact(tmp_path: Path, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Several pieces for each of the larger parameters.
    monkeypatch.setattr(importing, "_PIECE_BYTES", 4096)
    source, megatron, out = tmp_path / "source", tmp_path / "megatron", tmp_path / "out"
    save_model(source, name, dtype)
    import_checkpoint(source, megatron)
    export_checkpoint(megatron, out)
    assert_same_weights(out, source)
    assert architecture_from_hf(out) == architecture_from_hf(megatron) == architecture_from_hf(source)
    assert AutoModelForCausalLM.from_pretrained(out).dtype is dtype
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["megatron", "out", "source"]


def test_the_tokenizer_and_generation_config_come_along(tmp_path: Path) -> None:
    source, megatron, out = tmp_path / "source", tmp_path / "megatron", tmp_path / "out"
    save_model(source, "llama2")
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    (source / "modeling_llama.py").write_text("raise SystemExit")
    (source / "generation_config.json").write_text('{"temperature": 0.6}')
    import_checkpoint(source, megatron)
    export_checkpoint(megatron, out)
    for folder in (megatron, out):
        assert json.loads((folder / "tokenizer.json").read_text()) == {"version": "1.0"}
        assert json.loads((folder / "generation_config.json").read_text()) == {"temperature": 0.6}
        assert not (folder / "modeling_llama.py").exists()


@pytest.mark.parametrize("command", ["import", "export"])
def test_another_dtype(tmp_path: Path, command: str) -> None:
    source, megatron, out = tmp_path / "source", tmp_path / "megatron", tmp_path / "out"
    model = save_model(source, "qwen2")
    import_checkpoint(source, megatron, dtype=torch.bfloat16 if command == "import" else None)
    export_checkpoint(megatron, out, dtype=torch.bfloat16 if command == "export" else None)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype is torch.bfloat16
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.bfloat16()), name


def test_weights_of_several_types_keep_them(tmp_path: Path) -> None:
    source, megatron, out = tmp_path / "source", tmp_path / "megatron", tmp_path / "out"
    model = save_model(source, "llama2", torch.bfloat16)
    model.model.norm.to(torch.float32)
    model.save_pretrained(source)
    import_checkpoint(source, megatron)
    export_checkpoint(megatron, out)
    assert_same_weights(out, source)


def test_blocks_that_no_piece_begins_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "_PIECE_BYTES", 2048)
    save_model(tmp_path / "source", "gpt2")
    import_checkpoint(tmp_path / "source", tmp_path / "megatron")
    with HFWeights(tmp_path / "source") as hf, MegatronWeights(tmp_path / "megatron") as megatron:
        for name, shape in parameter_shapes(hf.architecture, 128).items():
            step = hf.row_step(name)
            rows = slice(step, shape[0] - step) if shape[0] > 2 * step else slice(0, shape[0])
            block = (rows,) if len(shape) == 1 else (rows, slice(3, shape[1] - 5))
            assert torch.equal(hf.read(name, block), megatron.read(name, block)), name


def test_an_existing_output_is_kept_unless_told(tmp_path: Path) -> None:
    source, megatron, out = tmp_path / "source", tmp_path / "megatron", tmp_path / "out"
    save_model(source, "llama2")
    import_checkpoint(source, megatron)
    export_checkpoint(megatron, out)
    with pytest.raises(UserError, match="megatron exists. Name another path, or give --overwrite"):
        import_checkpoint(source, megatron)
    with pytest.raises(UserError, match="out exists"):
        export_checkpoint(megatron, out)
    save_model(source, "qwen3")
    import_checkpoint(source, megatron, overwrite=True)
    export_checkpoint(megatron, out, overwrite=True)
    assert_same_weights(out, source)
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"out holds thesis\.tex"):
        export_checkpoint(megatron, out, overwrite=True)
    with pytest.raises(UserError, match="source is where the model comes from"):
        import_checkpoint(source, source, overwrite=True)


@pytest.mark.parametrize(
    ("tp", "pp", "message"), [(3, 1, "--tp is 3; it must divide"), (1, 5, "--pp is 5; it must not")]
)
def test_a_layout_the_model_cannot_have(tmp_path: Path, tp: int, pp: int, message: str) -> None:
    save_model(tmp_path / "source", "llama3_tied")
    with pytest.raises(UserError, match=message):
        import_checkpoint(tmp_path / "source", tmp_path / "megatron", tp=tp, pp=pp)
    assert not (tmp_path / "megatron").exists()


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "source", "llama2")
    usage = importing.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(importing.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"megatron needs 1\.\d MiB and .* has 0\.0 MiB free. Make room"):
        import_checkpoint(tmp_path / "source", tmp_path / "megatron")
