"""megatron-core's keys in a distributed checkpoint: one tensor for a parameter of all layers and experts."""

from __future__ import annotations

from collections.abc import Iterator

from megakd.config.architecture import GPTArchitecture
from megakd.parameters.sharding import expert_of, layer_of

# Modules whose state megatron-core asks for under Transformer Engine; it holds something only for FP8. That of
# core_attention only older releases ask for; one that is not asked for does no harm.
_WITH_EXTRA_STATE = ("self_attention.core_attention", "self_attention.linear_proj", "self_attention.linear_qkv")
_MLP_WITH_EXTRA_STATE = ("linear_fc1", "linear_fc2")
_NORM_BEFORE_EXPERTS = "mlp.linear_fc1.layer_norm_"


def stacked_key(name: str, architecture: GPTArchitecture) -> tuple[str, tuple[int, ...]]:
    """The key that holds a parameter, and where in the key's leading dimensions: (layer, expert), (layer,) or ()."""
    layer, expert = layer_of(name), expert_of(name)
    if layer is None:
        return name, ()
    key = name.replace(f"decoder.layers.{layer}.", "decoder.layers.", 1)
    if expert is not None:
        return key.replace(f".experts.{expert}.", ".experts.experts.", 1), (layer, expert)
    if architecture.num_moe_experts is not None:
        key = key.replace(_NORM_BEFORE_EXPERTS, "pre_mlp_layernorm.", 1)
    return key, (layer,)


def stacked_sizes(place: tuple[int, ...], architecture: GPTArchitecture) -> tuple[int, ...]:
    """Sizes of the leading dimensions of a key whose parameters are at places like this."""
    return (architecture.num_layers, architecture.num_moe_experts or 0)[: len(place)]


def extra_state_keys(architecture: GPTArchitecture) -> Iterator[str]:
    """Keys of the objects beside the tensors, one for a module in a layer, or in a layer and an expert."""
    layers, experts = architecture.num_layers, architecture.num_moe_experts
    norms = [f"self_attention.{which}_layernorm" for which in "qk" if architecture.qk_layernorm]
    norms += ["pre_mlp_layernorm"] if experts is not None else []
    attention = [
        (module, str(layer), str(layers)) for module in (*_WITH_EXTRA_STATE, *norms) for layer in range(layers)
    ]
    if experts is None:
        mlp = [
            (f"mlp.{module}", str(layer), str(layers)) for module in _MLP_WITH_EXTRA_STATE for layer in range(layers)
        ]
    else:
        mlp = [
            (f"mlp.experts.experts.{module}", f"{layer}.{expert}", f"{layers}.{experts}")
            for module in _MLP_WITH_EXTRA_STATE
            for layer in range(layers)
            for expert in range(experts)
        ]
    for module, place, sizes in attention + mlp:
        yield f"decoder.layers.{module}._extra_state/shard_{place}_{sizes}"
    yield "decoder.final_layernorm._extra_state/shard_0_1"
