"""GPTArchitecture to config.json, as both versions of transformers read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megakd.config.architecture import GPTArchitecture
from megakd.convert.families import FAMILIES, family_of_architecture
from megakd.convert.hf_checks import TOKEN_KEYS, is_id
from megakd.convert.hf_rope import write_rope
from megakd.convert.table import Family


def hf_config_from_architecture(
    architecture: GPTArchitecture, source: Mapping[str, Any] | None, dtype: str
) -> dict[str, Any]:
    """The config.json of a model, with the token ids of `source` (the config.json it descends from).

    Args:
        dtype: torch's name of the weights' type, such as "bfloat16".

    Raises:
        UserError: no family expresses the architecture.
    """
    family = family_for_export(architecture, source)
    source = source or {}
    config: dict[str, Any] = {"architectures": [family.model_class], "model_type": family.model_type}
    for field, key in family.fields.items():
        value = getattr(architecture, field)
        names = (*key.names, *key.aliases) if key.writes_aliases else key.names
        config.update(dict.fromkeys(names, value if key.words is None else key.words[value]))
    config.update({key: values[0] for key, values in family.only.items()})
    if architecture.position_embedding_type == "rope":
        config.update(write_rope(architecture))
    # transformers 5 reads `dtype`; version 4 and other readers of its folders read `torch_dtype`.
    config["dtype"] = config["torch_dtype"] = dtype
    config["use_cache"] = True
    for name in TOKEN_KEYS:
        # An absent key would be the family's default, which need not be a token of this vocabulary.
        config[name] = _known_tokens(source.get(name), architecture.vocab_size)
    return config


def family_for_export(architecture: GPTArchitecture, source: Mapping[str, Any] | None) -> Family:
    """The family a model is written as: that of the `source` config.json where it has a table and can express it."""
    model_type = (source or {}).get("model_type")
    preferred = next((family for family in FAMILIES if family.model_type == model_type), None)
    return family_of_architecture(architecture, preferred)


def _known_tokens(ids: Any, vocab_size: int) -> Any:
    if isinstance(ids, list):
        return [token for token in ids if _is_known(token, vocab_size)] or None
    return ids if _is_known(ids, vocab_size) else None


def _is_known(token: Any, vocab_size: int) -> bool:
    return is_id(token) and 0 <= token < vocab_size
