"""Checkpoints between the converter and megatron-core's own `dist_checkpointing`, which knows nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megakd.convert.exporting import export_checkpoint
from megakd.convert.importing import import_checkpoint
from tests.convert.family_models import MODELS, save_model
from tests.convert.test_exporting import assert_same_weights

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
# Of each kind of vocabulary, tied or not; the other families take one layout each.
EVERY_LAYOUT = ("llama2", "gpt2")
CASES = [(name, tp, pp) for name in EVERY_LAYOUT for tp, pp in LAYOUTS] + [
    (name, *LAYOUTS[1 + i % 3]) for i, name in enumerate(name for name in MODELS if name not in EVERY_LAYOUT)
]


def build_model(path: Path, tp: int, pp: int) -> Any:
    """A stage of the folder's model with every parameter NaN, and its mesh; inside a gloo worker."""
    from megakd.convert import architecture_from_hf
    from megakd.models.gpt import build_gpt
    from megakd.parallel.mesh import GroupPool, build_model_mesh
    from megakd.parallel.random_state import seed_megatron

    mesh = build_model_mesh(GroupPool(), tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    seed_megatron(1, mesh)
    architecture = architecture_from_hf(path)
    moe = architecture.num_moe_experts is not None
    model = build_gpt(architecture, mesh, dtype=torch.float32, layer_spec="local")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    for name, module in model.named_modules():
        separate = ("final_layernorm", "q_layernorm", "k_layernorm", *(["pre_mlp_layernorm"] if moe else []))
        if name.endswith(separate) and list(module.parameters()):
            module.__class__ = type(module.__class__.__name__, (_NormWithState, module.__class__), {})
    return model, mesh


class _NormWithState(torch.nn.Module):
    """As Transformer Engine 2's norms outside linear layers: with a state, which is empty."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        assert state is None or not state.numel()


def load_with_megatron_core(hf: Path, checkpoint: Path, tp: int, pp: int) -> dict[str, Any]:
    """Which parameters differ from the Hugging Face folder's; what the checkpoint lacks, has too much, else holds."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    from megakd.convert import architecture_from_hf, load_weights
    from megakd.models.parameters import canonical_parameters

    model, mesh = build_model(hf, tp, pp)
    # Megatron-LM's own words: the state of a model, unprefixed, under `model`.
    state = {"model": model.sharded_state_dict(metadata={"dp_cp_group": mesh.groups.dp_cp})}
    loaded, extra, lacking = dist_checkpointing.load(state, str(checkpoint), strict=StrictHandling.RETURN_ALL)
    model.load_state_dict(loaded.pop("model"), strict=not lacking)
    parameters = canonical_parameters(model)
    expected = {name: torch.full_like(parameter, torch.nan) for name, parameter in parameters.items()}
    load_weights(expected.items(), hf, architecture_from_hf(hf), tp_rank=mesh.tp_rank, tp_size=mesh.tp_size)
    different = [name for name, value in expected.items() if not torch.equal(value, parameters[name])]
    return {"different": different, "lacking": lacking, "extra": extra, "common": set(loaded)}


@pytest.mark.parametrize(("name", "tp", "pp"), CASES)
def test_megatron_core_loads_an_import(
    tmp_path: Path, name: str, tp: int, pp: int, run_ranks: Callable[..., list[Any]]
) -> None:
    save_model(tmp_path / "hf", name)
    # Meant for another layout than the one that loads it, and with more rows of padding where the model allows.
    meant = 4 if name in EVERY_LAYOUT else 1
    import_checkpoint(tmp_path / "hf", tmp_path / "megatron", tp=meant, pp=4 if pp == 1 else 1)
    release = tmp_path / "megatron" / "release"
    # No module of megatron-core 0.16 asks for this one; those of older releases do.
    too_much = {"decoder.layers.self_attention.core_attention._extra_state"}
    for found in run_ranks(tp * pp, load_with_megatron_core, tmp_path / "hf", release, tp, pp):
        assert found == {
            "different": [], "lacking": set(), "extra": too_much, "common": {"args", "checkpoint_version", "iteration"},
        }  # fmt: skip


def save_with_megatron_core(hf: Path, out: Path, tp: int, pp: int, key_per_layer: bool) -> None:
    """As Megatron-LM saves a model with --ckpt-format torch_dist."""
    from megatron.core import dist_checkpointing

    from megakd.convert import architecture_from_hf, load_weights
    from megakd.models.parameters import canonical_parameters

    model, mesh = build_model(hf, tp, pp)
    load_weights(
        canonical_parameters(model).items(), hf, architecture_from_hf(hf), tp_rank=mesh.tp_rank, tp_size=mesh.tp_size
    )
    metadata = {"dp_cp_group": mesh.groups.dp_cp, "non_homogeneous_layers": key_per_layer}
    weights = model.sharded_state_dict(metadata=metadata)
    dist_checkpointing.save({"model": weights, "iteration": 17, "checkpoint_version": 3.0}, str(out))


@pytest.mark.parametrize(
    ("name", "tp", "pp", "key_per_layer"),
    [(*case, False) for case in CASES] + [("qwen3", 2, 2, True), ("gpt2", 1, 2, True), ("qwen3_moe", 2, 1, True)],
)
def test_what_megatron_core_saves_is_exported(
    tmp_path: Path, name: str, tp: int, pp: int, key_per_layer: bool, run_ranks: Callable[..., list[Any]]
) -> None:
    save_model(tmp_path / "hf", name)
    (tmp_path / "megatron" / "iter_0000017").mkdir(parents=True)
    (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").write_text("17\n")
    folder = tmp_path / "megatron" / "iter_0000017"
    run_ranks(tp * pp, save_with_megatron_core, tmp_path / "hf", folder, tp, pp, key_per_layer)
    export_checkpoint(tmp_path / "megatron", tmp_path / "out", config_dir=tmp_path / "hf")
    assert_same_weights(tmp_path / "out", tmp_path / "hf")
