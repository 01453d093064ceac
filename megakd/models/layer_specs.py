"""Which modules a transformer layer is made of: ours on plain torch, or Transformer Engine's."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megakd.common.errors import UserError
from megakd.config.architecture import GPTArchitecture
from megakd.models.attention import ScaledDotProductAttention
from megakd.models.norms import norm_class
from megakd.platform import Accelerations


def resolve_layer_spec(name: str, accelerations: Accelerations) -> str:
    """Turn `auto` into the spec that is installed.

    Raises:
        UserError: Transformer Engine is asked for and not usable.
    """
    if name == "auto":
        return "local" if accelerations.transformer_engine else "transformer_engine"
    if name == "transformer_engine" and accelerations.transformer_engine:
        raise UserError(
            f"run.layer_spec is transformer_engine, which is not usable here ({accelerations.transformer_engine}); "
            "it must be installed on a machine with a GPU. Use local or auto."
        )
    return name


def build_block_spec(architecture: GPTArchitecture, layer_spec: str, num_layers: int) -> TransformerBlockSubmodules:
    """Modules of a stage with `num_layers` layers and, on the last stage, the final norm."""
    if layer_spec == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=architecture.qk_layernorm)
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)
    layer, norm = _local_layer(architecture), norm_class(architecture.normalization)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def _local_layer(architecture: GPTArchitecture) -> ModuleSpec:
    # megatron-core's local norm refuses sequence parallelism and its attention holds s x s scores: both are ours.
    layer = get_gpt_layer_local_spec(normalization=architecture.normalization, qk_layernorm=architecture.qk_layernorm)
    norm = norm_class(architecture.normalization)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = ScaledDotProductAttention
    if architecture.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    return layer
