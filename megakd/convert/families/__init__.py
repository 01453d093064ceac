"""The families of models that have a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megakd.common.errors import UserError
from megakd.config.architecture import GPTArchitecture
from megakd.convert.families.gpt2 import GPT2
from megakd.convert.families.llama import LLAMA
from megakd.convert.families.mistral import MISTRAL
from megakd.convert.families.mixtral import MIXTRAL
from megakd.convert.families.phi3 import PHI3
from megakd.convert.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from megakd.convert.table import Family

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, PHI3, GPT2)


def family_of_config(config: Mapping[str, Any], path: str | Path) -> Family:
    """The family of a config.json.

    Raises:
        UserError: no table has its `model_type`.
    """
    model_type = config.get("model_type")
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise UserError(f"model_type is {model_type!r} in {path}; the architectures that can be read are: {known}.")


def family_of_architecture(architecture: GPTArchitecture, preferred: Family | None = None) -> Family:
    """The family to write an architecture as: `preferred` where it can express it, or else the first that can.

    Raises:
        UserError: none can.
    """
    reasons = []
    for family in ([preferred] if preferred else []) + [family for family in FAMILIES if family is not preferred]:
        reason = cannot_express(family, architecture)
        if reason is None:
            return family
        reasons.append(reason)
    raise UserError(f"The model cannot be written as a Hugging Face folder: {'; '.join(reasons)}.")


def cannot_express(family: Family, architecture: GPTArchitecture) -> str | None:
    """Why a family has no model of this architecture; None where it has."""
    for field, value in family.fixed.items():
        found = getattr(architecture, field)
        # A bias that add_bias_linear brings anyway changes nothing.
        if found != value and not (field == "add_qkv_bias" and architecture.add_bias_linear):
            return f"{family.model_type} needs {field} {value} and it is {found}"
    hidden, heads = architecture.hidden_size, architecture.num_attention_heads
    if "kv_channels" not in family.fields and architecture.kv_channels * heads != hidden:
        return f"{family.model_type} needs kv_channels ({architecture.kv_channels}) to be hidden_size / heads"
    if "num_query_groups" not in family.fields and architecture.num_query_groups != heads:
        return f"{family.model_type} needs as many query groups ({architecture.num_query_groups}) as heads ({heads})"
    if family.heads_divide_hidden_size and hidden % heads:
        return f"{family.model_type} needs hidden_size ({hidden}) to be a multiple of num_attention_heads ({heads})"
    return None
