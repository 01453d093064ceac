"""The table of Mistral (Hugging Face's MistralForCausalLM): Llama with a sliding window."""

from __future__ import annotations

from megakd.convert.families.llama import ROTARY_BUFFERS, SHARED_FIELDS, SHARED_FIXED, SHARED_ONLY, SHARED_ROWS
from megakd.convert.table import ConfigKey, Family

MISTRAL = Family(
    model_type="mistral",
    model_class="MistralForCausalLM",
    fields=SHARED_FIELDS
    | {
        "num_query_groups": ConfigKey(("num_key_value_heads",), 8, null=True),
        "max_position_embeddings": ConfigKey(("max_position_embeddings",), 131072),
        "sliding_window": ConfigKey(("sliding_window",), 4096, null=True),
    },
    fixed={field: value for field, value in SHARED_FIXED.items() if field != "sliding_window"},
    only=SHARED_ONLY,
    rows=SHARED_ROWS,
    ignored=ROTARY_BUFFERS,
)
