"""config.json to GPTArchitecture and back, in the words of transformers 4 and 5."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megakd.common.errors import UserError
from megakd.config.architecture import GPTArchitecture, RopeScaling
from megakd.convert.families import FAMILIES, family_of_architecture, family_of_config
from megakd.convert.table import Family

_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SCALING_KEYS = tuple(RopeScaling.model_fields)


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """Read a Hugging Face folder's config.json.

    Raises:
        UserError: there is none, or it is not a JSON object.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise UserError(
            f"{path} has no config.json. Give a local Hugging Face folder, or a Megatron checkpoint with config.json "
            "beside it."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}). Download or save it again.") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} must hold a JSON object.")
    return config


def architecture_from_hf(path: str | Path) -> GPTArchitecture:
    """The architecture of a Hugging Face folder's model.

    Raises:
        UserError: the model's family has no table, or config.json asks for what megatron-core would not compute
            exactly.
    """
    config, file = read_hf_config(path), Path(path) / "config.json"
    family = family_of_config(config, file)
    for key, value in family.only.items():
        if config.get(key, value) != value:
            raise UserError(
                f"{key} is {_show(config[key])} in {file}; only {_show(value)} is supported for {family.model_type}."
            )
    found = {field: _read_field(family, field, config, file) for field in family.fields}
    values: dict[str, Any] = {field: value for field, value in found.items() if value is not None}
    values.update(family.fixed)
    if values["position_embedding_type"] == "rope":
        values.update(_read_rope(family, config, file))
    try:
        return GPTArchitecture(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{file}: {' '.join(str(part) for part in first['loc'])} {first['msg']}") from error


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
    config: dict[str, Any] = {"architectures": [family.model_class], "model_type": family.model_type}
    for field, keys in family.fields.items():
        value = getattr(architecture, field)
        config.update(dict.fromkeys((*keys.names, *keys.aliases), value if keys.words is None else keys.words[value]))
    config.update({key: value for key, value in family.only.items() if value is not None})
    if architecture.position_embedding_type == "rope":
        config.update(_write_rope(architecture))
    # transformers 5 reads `dtype`; version 4 and other readers of its folders read `torch_dtype`.
    config["dtype"] = config["torch_dtype"] = dtype
    config["use_cache"] = True
    for key in _TOKEN_KEYS:
        # An absent key would be the family's default, which need not be a token of this vocabulary.
        config[key] = _known_tokens((source or {}).get(key), architecture.vocab_size)
    return config


def family_for_export(architecture: GPTArchitecture, source: Mapping[str, Any] | None) -> Family:
    """The family a model is written as: that of the `source` config.json where it has a table and can express it."""
    model_type = (source or {}).get("model_type")
    preferred = next((family for family in FAMILIES if family.model_type == model_type), None)
    return family_of_architecture(architecture, preferred)


def _read_field(family: Family, field: str, config: Mapping[str, Any], file: Path) -> Any:
    key, names = family.fields[field], family.fields[field].names
    default = key.default(config) if callable(key.default) else key.default
    said = {name: value for name, value in config.items() if key.null or value is not None}
    absent = next((said[name] for name in key.aliases if name in said), default)
    values = [said.get(name, absent) for name in names]
    if any(value != values[0] for value in values):
        found = " and ".join(f"{name} is {_show(value)}" for name, value in zip(names, values, strict=True))
        raise UserError(f"{found} in {file}; they are supported only where they are equal.")
    value = values[0]
    if value is None and not key.null:
        raise UserError(f"{file} has no {names[0]}, which a {family.model_type} model needs.")
    if key.words is None or value is None:
        return value
    for ours, theirs in key.words.items():
        if value == theirs:
            return ours
    raise UserError(
        f"{names[0]} is {_show(value)} in {file}; only {', '.join(_show(word) for word in key.words.values())} are "
        f"supported for {family.model_type}."
    )


def _read_rope(family: Family, config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(key) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{key} is {_show(rope)} in {file}; it must be an object.")
    theta = rope.get("rope_theta", config.get("rope_theta"))
    percent = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    values: dict[str, Any] = {
        "rotary_base": family.default_theta if theta is None else float(theta),
        "rotary_percent": 1.0 if percent is None else float(percent),
    }
    if values["rotary_percent"] != family.fixed.get("rotary_percent", values["rotary_percent"]):
        raise UserError(f"partial_rotary_factor is {percent} in {file}; {family.model_type} turns whole heads only.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return values
    if kind != "llama3":
        raise UserError(f"{key}.rope_type is {_show(kind)} in {file}; only default and llama3 are supported.")
    scaling: dict[str, Any] = {name: rope.get(name) for name in _SCALING_KEYS}
    if scaling["original_max_position_embeddings"] is None:
        scaling["original_max_position_embeddings"] = config.get("max_position_embeddings")
    for name, value in scaling.items():
        if not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{key}.{name} is {_show(value)} in {file}; rope_type llama3 needs a number above 0.")
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError(
            f"{key}.low_freq_factor is {scaling['low_freq_factor']} in {file}; it must be below high_freq_factor, "
            f"{scaling['high_freq_factor']}."
        )
    return values | {"rope_scaling": RopeScaling(**scaling)}


def _write_rope(architecture: GPTArchitecture) -> dict[str, Any]:
    """As both versions of transformers spell it: version 5 reads `rope_parameters`, version 4 the other two."""
    scaling = architecture.rope_scaling
    both: dict[str, Any] = {"rope_theta": architecture.rotary_base}
    if architecture.rotary_percent != 1.0:
        both["partial_rotary_factor"] = architecture.rotary_percent
    if scaling is None:
        return both | {"rope_parameters": {"rope_type": "default"} | both}
    parameters: dict[str, Any] = {"rope_type": "llama3"} | scaling.model_dump()
    return both | {"rope_scaling": parameters, "rope_parameters": parameters | both}


def _known_tokens(ids: Any, vocab_size: int) -> Any:
    if isinstance(ids, list):
        return [token for token in ids if token < vocab_size] or None
    return ids if isinstance(ids, int) and ids < vocab_size else None


def _show(value: object) -> str:
    return json.dumps(value)
