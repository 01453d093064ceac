"""No weight is lost or changed on the way: mixed types, heads beside tied embeddings, values beyond a type's range."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megakd.common.errors import UserError
from megakd.convert.exporting import export_checkpoint
from megakd.convert.importing import import_checkpoint
from megakd.convert.loading import check_weights
from megakd.convert.megatron_weights import MegatronWeights
from tests.convert.family_models import save_model
from tests.convert.test_command_line import edit_config
from tools.convert_checkpoint import main

Weights = dict[str, torch.Tensor]


def edit(folder: Path, change: Callable[[Weights], object]) -> Weights:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    save_model(tmp_path / "hf", "qwen2", torch.bfloat16)
    return tmp_path / "hf"


def retype(names: tuple[str, ...], dtype: torch.dtype) -> Callable[[Weights], object]:
    """Give weights values that their former type does not have."""

    def change(weights: Weights) -> None:
        for name in weights:
            if any(part in name for part in names):
                weights[name] = weights[name].to(dtype) * 1.001

    return change


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("layers.1.",), ("model.layers.0.", "model.layers.1.")),
        (("layers.0.self_attn.k_proj.bias",), ("model.layers.0.self_attn.q_proj.bias", "self_attn.k_proj.bias")),
        (("layers.2.mlp.up_proj",), ("model.layers.0.mlp.gate_proj.weight", "model.layers.2.mlp.up_proj.weight")),
    ],
)
def test_one_tensor_of_two_types_is_refused_unless_a_type_is_given(
    hf: Path, tmp_path: Path, names: tuple[str, ...], told: tuple[str, str]
) -> None:
    weights = edit(hf, retype(names, torch.float32))
    with pytest.raises(UserError, match="Give --dtype to write all weights as one type") as caught:
        import_checkpoint(hf, tmp_path / "out")
    assert all(word in str(caught.value) for word in (*told, "bfloat16", "float32"))
    assert not (tmp_path / "out").exists()
    import_checkpoint(hf, tmp_path / "out", dtype=torch.float32)
    export_checkpoint(tmp_path / "out", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], weight.float()) for name, weight in weights.items())
    assert main(["verify", "--hf", str(hf), "--megatron", str(tmp_path / "out")]) == 0


def test_kinds_of_weights_may_have_types_of_their_own(hf: Path, tmp_path: Path) -> None:
    weights = edit(hf, retype(("norm",), torch.float32))
    import_checkpoint(hf, tmp_path / "out")
    export_checkpoint(tmp_path / "out", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(back[name].dtype is w.dtype and torch.equal(back[name], w) for name, w in weights.items())


@pytest.mark.parametrize(("name", "head"), [("qwen2_tied", "lm_head.weight"), ("gpt2", "lm_head.weight")])
def test_a_head_beside_tied_embeddings_must_be_them(tmp_path: Path, name: str, head: str) -> None:
    hf = tmp_path / "hf"
    save_model(hf, name)
    embedding = next(key for key in load_file(hf / "model.safetensors") if "embed_tokens" in key or "wte" in key)
    edit(hf, lambda weights: weights.update({head: weights[embedding].clone()}))
    import_checkpoint(hf, tmp_path / "equal")
    edit(hf, lambda weights: weights[head][130, 5].add_(1e-3))
    message = f"{head} in {hf} differs from {embedding}, and config.json says tie_word_embeddings true"
    with pytest.raises(UserError, match=message):
        import_checkpoint(hf, tmp_path / "out")
    assert main(["verify", "--weights-only", "--hf", str(hf), "--megatron", str(tmp_path / "equal")]) == 2
    with MegatronWeights(tmp_path / "equal") as source, pytest.raises(UserError, match=message):
        check_weights(hf, source.architecture)


def test_a_head_beside_tied_embeddings_of_a_megatron_checkpoint(tmp_path: Path) -> None:
    """What a config.json of the wrong model would drop."""
    save_model(tmp_path / "hf", "qwen2")
    import_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    edit_config(tmp_path / "megatron", tie_word_embeddings=True)
    with pytest.raises(UserError, match="output_layer.weight in .* differs from embedding.word_embeddings.weight"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_head_names_the_key_that_ties_it(hf: Path, tmp_path: Path) -> None:
    edit(hf, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(UserError, match=r"has no weight lm_head.weight, .* Set tie_word_embeddings to true"):
        import_checkpoint(hf, tmp_path / "out")


@pytest.mark.parametrize("direction", ["import", "export"])
def test_values_beyond_a_type_are_refused(hf: Path, tmp_path: Path, direction: str) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    edit(hf, lambda weights: weights[name][3, 4].fill_(-1e5))
    megatron, out = tmp_path / "megatron", tmp_path / "out"
    if direction == "export":
        import_checkpoint(hf, megatron)
    with pytest.raises(UserError, match="holds 9.984e.04, and float16 ends at 6.55e.04. Use --dtype bf16 or fp32") as e:
        if direction == "import":
            import_checkpoint(hf, out, dtype=torch.float16)
        else:
            export_checkpoint(megatron, out, dtype=torch.float16)
    assert ("down_proj" if direction == "import" else "linear_fc2") in str(e.value)
    assert not out.exists()


def test_infinite_values_stay_what_they_are(hf: Path, tmp_path: Path) -> None:
    def change(weights: Weights) -> None:
        weights["model.norm.weight"][:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])

    edit(hf, change)
    import_checkpoint(hf, tmp_path / "out", dtype=torch.float16)
    export_checkpoint(tmp_path / "out", tmp_path / "back")
    norm = load_file(tmp_path / "back" / "model.safetensors")["model.norm.weight"]
    assert norm[:2].tolist() == [torch.inf, -torch.inf] and norm[2].isnan() and norm[3:].isfinite().all()
