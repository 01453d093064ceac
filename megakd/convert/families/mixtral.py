"""The table of Mixtral (Hugging Face's MixtralForCausalLM): Mistral with experts."""

from __future__ import annotations

from megakd.convert.families.llama import (
    ATTENTION_ROWS,
    NORM_ROWS,
    OUTER_ROWS,
    SHARED_FIELDS,
    SHARED_FIXED,
    SHARED_ONLY,
    H,
    M,
)
from megakd.convert.mappings import Direct, GatedMLP
from megakd.convert.table import ConfigKey, Family, Row

_VARIES = ("sliding_window", "num_moe_experts")
_OURS, _THEIRS = M + "mlp.experts.{e}.", H + "block_sparse_moe.experts.{e}."

MIXTRAL = Family(
    model_type="mixtral",
    model_class="MixtralForCausalLM",
    fields=SHARED_FIELDS
    | {
        "layernorm_epsilon": ConfigKey(("rms_norm_eps",), 1e-5),
        "num_query_groups": ConfigKey(("num_key_value_heads",), 8, null=True),
        "max_position_embeddings": ConfigKey(("max_position_embeddings",), 131072),
        "sliding_window": ConfigKey(("sliding_window",), null=True),
        "num_moe_experts": ConfigKey(("num_local_experts",), 8, aliases=("num_experts",)),
        "moe_router_topk": ConfigKey(("num_experts_per_tok",), 2),
    },
    fixed={field: value for field, value in SHARED_FIXED.items() if field not in _VARIES}
    # transformers divides by the sum over a token's experts, which is their softmax.
    | {"moe_ffn_hidden_size": None, "moe_router_pre_softmax": False},
    only=SHARED_ONLY | {"router_jitter_noise": (0.0,)},
    rows=(
        *OUTER_ROWS,
        *NORM_ROWS,
        *ATTENTION_ROWS,
        Row(M + "mlp.router.weight", (H + "block_sparse_moe.gate.weight",), Direct()),
        Row(_OURS + "linear_fc1.weight", (_THEIRS + "w1.weight", _THEIRS + "w3.weight"), GatedMLP()),
        Row(_OURS + "linear_fc2.weight", (_THEIRS + "w2.weight",), Direct()),
    ),
    default_theta=1e6,
)
