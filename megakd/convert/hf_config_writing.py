"""GPTArchitecture to config.json, as both versions of transformers read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megakd.config.architecture import GPTArchitecture
from megakd.convert.families import FAMILIES, family_of_architecture
from megakd.convert.hf_checks import ONLY_IN_EVERY_FAMILY, TOKEN_KEYS, is_id, layer_type
from megakd.convert.hf_rope import ROPE_KEYS, write_rope
from megakd.convert.table import Family

_NOT_KEPT = (
    # Said anew.
    {"architectures", "model_type", "dtype", "torch_dtype", *ROPE_KEYS, *ONLY_IN_EVERY_FAMILY}
    # Who wrote it, and code that does not come along.
    | {"transformers_version", "auto_map", "custom_pipelines"}
    # Transformers 4's: the sizes of a computation in parts, and of a buffer, which need not fit another shape.
    | {"pretraining_tp", "n_ctx"}
    # One entry for each layer of the model it was.
    | {"layer_types", "mlp_layer_types", "kv_sharing_modes"}
)


def hf_config_from_architecture(
    architecture: GPTArchitecture, source: Mapping[str, Any] | None, dtype: str
) -> dict[str, Any]:
    """The config.json of a model, with all that `source`, the config.json it descends from, says beside the
    architecture where it is of the same family, and its token ids in any case.

    Args:
        dtype: torch's name of the weights' type, such as "bfloat16".

    Raises:
        UserError: no family expresses the architecture.
    """
    family = family_for_export(architecture, source)
    source = source or {}
    config = _kept(family, architecture, source) if source.get("model_type") == family.model_type else {}
    config.update({"architectures": [family.model_class], "model_type": family.model_type})
    for field, key in family.fields.items():
        value = getattr(architecture, field)
        names = (*key.names, *key.aliases) if key.writes_aliases else key.names
        config.update(dict.fromkeys(names, value if key.words is None else key.words[value]))
    config.update({key: values[0] for key, values in family.only.items()})
    if architecture.position_embedding_type == "rope":
        config.update(write_rope(architecture))
    # transformers 5 reads `dtype`; version 4 and other readers of its folders read `torch_dtype`.
    config["dtype"] = config["torch_dtype"] = dtype
    config.setdefault("use_cache", True)
    for name in TOKEN_KEYS:
        # An absent key would be the family's default, which need not be a token of this vocabulary.
        config[name] = _known_tokens(source.get(name), architecture.vocab_size)
    return config


def family_for_export(architecture: GPTArchitecture, source: Mapping[str, Any] | None) -> Family:
    """The family a model is written as: that of the `source` config.json where it has a table and can express it."""
    model_type = (source or {}).get("model_type")
    preferred = next((family for family in FAMILIES if family.model_type == model_type), None)
    return family_of_architecture(architecture, preferred)


def _kept(family: Family, architecture: GPTArchitecture, source: Mapping[str, Any]) -> dict[str, Any]:
    """What `source` says of other things than the shape, which may be another one here."""
    known = {name for key in family.fields.values() for name in (*key.names, *key.aliases)}
    kept = {
        key: value
        for key, value in source.items()
        if key not in known | set(family.only) | _NOT_KEPT
        # Where it was loaded from, and names of kernels, which may be somebody's code.
        and not key.startswith("_")
        and not key.endswith("_implementation")
    }
    if architecture.rope_scaling is not None:
        kept.pop("original_max_position_embeddings", None)
    if source.get("layer_types") is not None:
        kept["layer_types"] = [layer_type(architecture)] * architecture.num_layers
    for key in [key for key in kept if key.endswith("_token_id")]:
        kept[key] = _known_tokens(kept[key], architecture.vocab_size)
    return kept


def _known_tokens(ids: Any, vocab_size: int) -> Any:
    if isinstance(ids, list):
        return [token for token in ids if _is_known(token, vocab_size)] or None
    return ids if _is_known(ids, vocab_size) else None


def _is_known(token: Any, vocab_size: int) -> bool:
    return is_id(token) and 0 <= token < vocab_size
