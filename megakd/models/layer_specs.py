"""Which modules a transformer layer is made of: ours on plain torch, or Transformer Engine's."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megakd.config.architecture import GPTArchitecture
from megakd.models.attention import ScaledDotProductAttention
from megakd.models.experts import Router
from megakd.models.norms import norm_class


def build_block_spec(architecture: GPTArchitecture, layer_spec: str, num_layers: int) -> TransformerBlockSubmodules:
    """Modules of a stage with `num_layers` layers and, on the last stage, the final norm."""
    if layer_spec == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=architecture.num_moe_experts, qk_layernorm=architecture.qk_layernorm
        )
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)
    layer, norm = _local_layer(architecture), norm_class(architecture.normalization)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def _local_layer(architecture: GPTArchitecture) -> ModuleSpec:
    # megatron-core's local norm refuses sequence parallelism and its attention holds s x s scores: both are ours.
    layer = get_gpt_layer_local_spec(
        num_experts=architecture.num_moe_experts,
        normalization=architecture.normalization,
        qk_layernorm=architecture.qk_layernorm,
    )
    norm = norm_class(architecture.normalization)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = ScaledDotProductAttention
    if architecture.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    if architecture.num_moe_experts is not None:
        layer.submodules.mlp.submodules.router = Router
        # Transformer Engine's layers keep the norm before experts by itself, and so do Megatron-LM's checkpoints.
        layer.submodules.sharded_state_dict_keys_map = {
            "input_layernorm.": layer.submodules.sharded_state_dict_keys_map["input_layernorm."]
        }
    return layer
