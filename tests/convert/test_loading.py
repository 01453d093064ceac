from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megakd.common.errors import UserError
from megakd.convert import architecture_from_hf, check_weights, load_head, load_weights
from megakd.convert.safetensors_folder import SafetensorsFolder
from megakd.parameters.shapes import parameter_shapes
from megakd.parameters.sharding import shard_of, take_shard
from tests.convert.llama_models import ALL_HEADS, GROUPED, megatron_shard, save_llama

MODELS: dict[str, dict[str, Any]] = {
    "grouped": GROUPED,
    "all_heads_tied": ALL_HEADS | {"tie_word_embeddings": True},
    "wide_heads": GROUPED | {"head_dim": 16},
    "biases": GROUPED | {"attention_bias": True, "mlp_bias": True},
}


def load(path: Path, tp_rank: int, tp_size: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    architecture = architecture_from_hf(path)
    shapes = parameter_shapes(architecture, 128)
    # The last stage of a tied model holds the embedding's weight a second time.
    shapes.setdefault("output_layer.weight", shapes["embedding.word_embeddings.weight"])
    parameters = {
        name: take_shard(torch.full(shape, torch.nan, dtype=dtype), shard_of(name, architecture), 0, tp_size).clone()
        for name, shape in shapes.items()
    }
    load_weights(parameters.items(), path, architecture, tp_rank=tp_rank, tp_size=tp_size)
    return parameters


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_every_rank_gets_its_shard(tmp_path: Path, model: str, tp_size: int) -> None:
    hf = save_llama(tmp_path, **MODELS[model])
    for tp_rank in range(tp_size):
        for name, shard in load(tmp_path, tp_rank, tp_size).items():
            expected = megatron_shard(name, hf.state_dict(), hf.config, tp_rank, tp_size, padded_vocab=256)
            assert torch.equal(shard, expected), (name, tp_rank)


def test_values_are_converted_to_the_parameters_dtype(tmp_path: Path) -> None:
    hf = save_llama(tmp_path, dtype=torch.bfloat16)
    norm = load(tmp_path, 0, 1)["decoder.final_layernorm.weight"]
    assert norm.dtype is torch.float32
    assert torch.equal(norm, hf.model.norm.weight.float())


def test_a_rank_reads_no_more_than_its_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path)
    numbers_read: list[int] = []
    read = SafetensorsFolder.read

    def counted(self: SafetensorsFolder, name: str, slices: tuple[slice, ...] | None = None) -> torch.Tensor:
        part = read(self, name, slices)
        numbers_read.append(part.numel())
        return part

    monkeypatch.setattr(SafetensorsFolder, "read", counted)
    parameters = load(tmp_path, 0, 4)
    assert sum(numbers_read) == sum(parameter.numel() for parameter in parameters.values())


def test_depth_pruning_takes_the_mapped_layers(tmp_path: Path) -> None:
    hf = save_llama(tmp_path)
    pruned = architecture_from_hf(tmp_path).model_copy(update={"num_layers": 2})
    check_weights(tmp_path, pruned, [2, 0])
    parameters = {name: torch.empty(shape) for name, shape in parameter_shapes(pruned, 128).items()}
    load_weights(parameters.items(), tmp_path, pruned, tp_rank=0, tp_size=1, layer_map=[2, 0])
    for target, source in ((0, 2), (1, 0)):
        down = hf.model.layers[source].mlp.down_proj.weight
        assert torch.equal(parameters[f"decoder.layers.{target}.mlp.linear_fc2.weight"], down)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padded_vocab", [256, 96])
def test_head_in_another_vocabulary_partition(tmp_path: Path, tied: bool, padded_vocab: int) -> None:
    hf = save_llama(tmp_path, tie_word_embeddings=tied)
    parts = [
        load_head(tmp_path, tp_rank=r, tp_size=4, padded_vocab=padded_vocab, dtype=torch.bfloat16, device="cpu")
        for r in range(4)
    ]
    known = min(padded_vocab, 130)
    expected = torch.zeros(padded_vocab, 32, dtype=torch.bfloat16)
    expected[:known] = hf.lm_head.weight[:known].bfloat16()
    assert all(part.shape == (padded_vocab // 4, 32) for part in parts)
    assert torch.equal(torch.cat(parts), expected)


def test_a_head_is_no_view_of_the_file(tmp_path: Path) -> None:
    """Which would hold all rows, and change or fail with the file."""
    save_llama(tmp_path)
    head = load_head(tmp_path, tp_rank=0, tp_size=2, padded_vocab=130, dtype=torch.float32, device="cpu")
    assert head.untyped_storage().nbytes() == 65 * 32 * 4


def test_more_tensor_ranks_than_query_groups_are_refused(tmp_path: Path) -> None:
    save_llama(tmp_path, num_attention_heads=8, num_key_value_heads=2)
    with pytest.raises(UserError, match=r"size is 4; it must divide the model's num_query_groups \(2\)"):
        load(tmp_path, 0, 4)


def test_a_parameter_of_another_shape_is_named(tmp_path: Path) -> None:
    save_llama(tmp_path)
    parameters = [("decoder.final_layernorm.weight", torch.empty(16))]
    with pytest.raises(UserError, match=r"decoder.final_layernorm.weight the shape \[32\] .* needs \[16\]"):
        load_weights(parameters, tmp_path, architecture_from_hf(tmp_path), tp_rank=0, tp_size=1)


def test_layer_map_of_another_length_is_refused(tmp_path: Path) -> None:
    save_llama(tmp_path)
    with pytest.raises(UserError, match="2 layers of .* for a model of num_layers 3"):
        check_weights(tmp_path, architecture_from_hf(tmp_path), [0, 1])


@pytest.mark.parametrize("model", MODELS)
def test_a_whole_folder_passes_the_check(tmp_path: Path, model: str) -> None:
    save_llama(tmp_path, **MODELS[model])
    check_weights(tmp_path, architecture_from_hf(tmp_path))


def edited(path: Path, **changes: torch.Tensor | None) -> None:
    """Add, replace or (None) remove weights of a saved model; dots in names are written as two underscores."""
    weights = load_file(path / "model.safetensors")
    for name, value in changes.items():
        key = name.replace("__", ".")
        if value is None:
            del weights[key]
        else:
            weights[key] = value
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__norm__weight": None}, r"has no weight model.norm.weight, of shape \[32\]"),
        (
            {"lm_head__weight": torch.zeros(128, 32)},
            r"lm_head.weight in .* has the shape \[128, 32\]; config.json means \[130, 32\]",
        ),
        (
            {"model__layers__3__mlp__up_proj__weight": torch.zeros(1)},
            "has the weight model.layers.3.mlp.up_proj.weight, which a llama model",
        ),
        (
            {"model__norm__weight": torch.zeros(32, dtype=torch.int8)},
            "model.norm.weight in .* is stored as I8; it must be F64",
        ),
    ],
)
def test_check_names_the_weight(tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str) -> None:
    save_llama(tmp_path)
    edited(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        check_weights(tmp_path, architecture_from_hf(tmp_path))
    assert "\n" not in str(caught.value)


def test_buffers_and_the_head_of_a_tied_model_are_passed_over(tmp_path: Path) -> None:
    save_llama(tmp_path, tie_word_embeddings=True)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edited(
        tmp_path,
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(2),
        lm_head__weight=embedding.clone(),
    )
    check_weights(tmp_path, architecture_from_hf(tmp_path))


def test_config_that_asks_for_more_layers_than_are_stored(tmp_path: Path) -> None:
    save_llama(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 4}))
    with pytest.raises(UserError, match="has no weight model.layers.3.input_layernorm.weight"):
        check_weights(tmp_path, architecture_from_hf(tmp_path))
