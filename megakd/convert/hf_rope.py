"""Rotary position embeddings of a config.json, in the words of transformers 4 and 5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from megakd.common.errors import UserError
from megakd.config.architecture import GPTArchitecture, RopeScaling
from megakd.convert.hf_checks import show
from megakd.convert.table import Family

ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
"""Keys of config.json that `read_rope` reads and `write_rope` writes."""

_SCALING_KEYS = tuple(RopeScaling.model_fields)
_ORIGINAL = "original_max_position_embeddings"


def read_rope(family: Family, config: Mapping[str, Any], positions: object, file: Path) -> dict[str, Any]:
    """Architecture fields that rope's keys hold.

    Args:
        positions: `max_position_embeddings`, which is the original one where llama3's scaling does not say another.

    Raises:
        UserError: they ask for another rope than megatron-core's, are no numbers, or contradict each other.
    """
    read: dict[str, dict[str, Any]] = {}
    for key in ("rope_scaling", "rope_parameters"):
        block = config.get(key)
        if block is not None and not isinstance(block, dict):
            raise UserError(f"{key} is {show(block)} in {file}; it must be an object.")
        if block:
            read[key] = _read_block(family, key, block, config, positions, file)
    if not read:
        return _read_block(family, "rope_parameters", {}, config, positions, file)
    first, *others = read.values()
    # transformers 5 takes rope_scaling where there are both, other readers rope_parameters.
    if any(other != first for other in others):
        raise UserError(
            f"rope_scaling is {show(config['rope_scaling'])} and rope_parameters is {show(config['rope_parameters'])} "
            f"in {file}; they contradict each other. Take the wrong one out."
        )
    return first


def _read_block(
    family: Family, key: str, block: Mapping[str, Any], config: Mapping[str, Any], positions: object, file: Path
) -> dict[str, Any]:
    for name, value in block.items():
        if isinstance(value, dict):
            raise UserError(
                f"{key}.{name} is {show(value)} in {file}; only one rope for all layers is supported for "
                f"{family.model_type}."
            )
    theta = _agreed("rope_theta", key, block, config, file)
    percent = _agreed("partial_rotary_factor", key, block, config, file)
    values: dict[str, Any] = {
        "rotary_base": family.default_theta if theta is None else _number("rope_theta", theta, file),
        "rotary_percent": 1.0 if percent is None else _number("partial_rotary_factor", percent, file),
    }
    if values["rotary_percent"] != family.fixed.get("rotary_percent", values["rotary_percent"]):
        raise UserError(f"partial_rotary_factor is {percent} in {file}; {family.model_type} turns whole heads only.")
    kind = block.get("rope_type", block.get("type", "default"))
    if kind == "default":
        return values
    if kind != "llama3":
        raise UserError(f"{key}.rope_type is {show(kind)} in {file}; only default and llama3 are supported.")
    scaling: dict[str, Any] = {name: block.get(name) for name in _SCALING_KEYS}
    scaling[_ORIGINAL] = _agreed(_ORIGINAL, key, block, config, file)
    if scaling[_ORIGINAL] is None:
        scaling[_ORIGINAL] = positions
    for name, value in scaling.items():
        if not _is_number(value) or value <= 0:
            raise UserError(f"{key}.{name} is {show(value)} in {file}; rope_type llama3 needs a number above 0.")
    if scaling[_ORIGINAL] != int(scaling[_ORIGINAL]):
        raise UserError(f"{key}.{_ORIGINAL} is {scaling[_ORIGINAL]} in {file}; it must be a whole number.")
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError(
            f"{key}.low_freq_factor is {scaling['low_freq_factor']} in {file}; it must be below high_freq_factor, "
            f"{scaling['high_freq_factor']}."
        )
    return values | {"rope_scaling": RopeScaling(**scaling)}


def write_rope(architecture: GPTArchitecture) -> dict[str, Any]:
    """As both versions of transformers spell it: version 5 reads `rope_parameters`, version 4 the other two."""
    scaling = architecture.rope_scaling
    both: dict[str, Any] = {"rope_theta": architecture.rotary_base}
    if architecture.rotary_percent != 1.0:
        both["partial_rotary_factor"] = architecture.rotary_percent
    if scaling is None:
        return both | {"rope_parameters": {"rope_type": "default"} | both}
    parameters: dict[str, Any] = {"rope_type": "llama3"} | scaling.model_dump()
    return both | {"rope_scaling": parameters, "rope_parameters": parameters | both}


def _agreed(name: str, key: str, block: Mapping[str, Any], config: Mapping[str, Any], file: Path) -> Any:
    """A value that may stand in `key` or beside it: which of two counts differs between readers."""
    inside, beside = block.get(name), config.get(name)
    if inside is not None and beside is not None and inside != beside:
        raise UserError(
            f"{key}.{name} is {show(inside)} and {name} is {show(beside)} in {file}; they contradict each other. Take "
            "the wrong one out."
        )
    return beside if inside is None else inside


def _number(name: str, value: object, file: Path) -> float:
    if not _is_number(value) or float(value) <= 0:
        raise UserError(f"{name} is {show(value)} in {file}; it must be a finite number above 0.")
    return float(value)


def _is_number(value: object) -> TypeGuard[int | float]:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
