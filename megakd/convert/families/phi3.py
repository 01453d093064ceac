"""The table of Phi-3 and Phi-4-mini (Hugging Face's Phi3ForCausalLM): q, k and v in one weight, gate and up in one."""

from __future__ import annotations

from megakd.convert.families.llama import (
    DOWN_ROW,
    NORM_ROWS,
    OUTER_ROWS,
    PROJ_ROW,
    ROTARY_BUFFERS,
    SHARED_FIELDS,
    SHARED_FIXED,
    SHARED_ONLY,
    H,
    M,
)
from megakd.convert.mappings import Direct, GroupedQKV
from megakd.convert.table import ConfigKey, Family, Row

_VARIES = ("rotary_percent", "sliding_window")

PHI3 = Family(
    model_type="phi3",
    model_class="Phi3ForCausalLM",
    fields=SHARED_FIELDS
    | {
        "layernorm_epsilon": ConfigKey(("rms_norm_eps",), 1e-5),
        "max_position_embeddings": ConfigKey(("max_position_embeddings",), 4096),
        "sliding_window": ConfigKey(("sliding_window",), null=True),
    },
    fixed={field: value for field, value in SHARED_FIXED.items() if field not in _VARIES} | {"rope_scaling": None},
    only=SHARED_ONLY,
    rows=(
        *OUTER_ROWS,
        *NORM_ROWS,
        PROJ_ROW,
        DOWN_ROW,
        Row(M + "self_attention.linear_qkv.weight", (H + "self_attn.qkv_proj.weight",), GroupedQKV(fused=True)),
        # Both sides hold [gate; up].
        Row(M + "mlp.linear_fc1.weight", (H + "mlp.gate_up_proj.weight",), Direct()),
    ),
    ignored=ROTARY_BUFFERS,
    heads_divide_hidden_size=True,
)
