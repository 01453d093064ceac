"""What config.json must not say: that the model is another one than its family's table computes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megakd.common.errors import UserError
from megakd.config.architecture import GPTArchitecture
from megakd.convert.table import Family

TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
ONLY_IN_EVERY_FAMILY: Mapping[str, tuple[object, ...]] = {
    # What transformers reads for every model beside the keys of its class.
    "is_causal": (True,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "transformers_weights": (None,),
}
"""Keys of which the first value is what an absent key means, and the others mean the same."""

# Of transformers before `layer_types` had today's words.
_LEGACY_LAYER_TYPES = {"attention": "full_attention"}


def show(value: object) -> str:
    """A value as config.json spells it, cut where it is long."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= 200 else text[:200] + "..."


def check_only(family: Family, config: Mapping[str, Any], file: Path) -> None:
    """Refuse values that megatron-core would not compute.

    Raises:
        UserError: a key has another value than those its table supports.
    """
    for key, values in {**ONLY_IN_EVERY_FAMILY, **family.only}.items():
        if key in config and config[key] not in values:
            raise UserError(
                f"{key} is {show(config[key])} in {file}; only {show(values[0])} is supported for {family.model_type}."
            )


def check_no_adapter(path: Path) -> None:
    """Refuse a model with an adapter beside its weights, which transformers applies where PEFT is installed.

    Raises:
        UserError: there is one.
    """
    if (path / "adapter_config.json").exists():
        raise UserError(
            f"{path} has adapter_config.json: an adapter that would not be applied. Merge it into the weights and "
            "remove the file."
        )


def check_model_class(family: Family, config: Mapping[str, Any], file: Path) -> None:
    """Refuse a folder whose weights are another class's than the family's. `auto_map` may name a copy of it.

    Raises:
        UserError: they are.
    """
    classes = config.get("architectures")
    if classes is not None and (
        not isinstance(classes, list) or (classes and not any(family.is_class(name) for name in classes))
    ):
        raise UserError(
            f"architectures is {show(classes)} in {file}; only {family.model_class} and {family.base_class} are "
            f"supported for {family.model_type}."
        )
    code = config.get("auto_map")
    if code is None:
        return
    if not isinstance(code, dict):
        raise UserError(f"auto_map is {show(code)} in {file}; it must be an object.")
    for key in ("AutoModelForCausalLM", "AutoModel"):
        if key in code and not family.is_class(str(code[key]).rpartition(".")[2]):
            raise UserError(
                f"auto_map.{key} is {show(code[key])} in {file}: code of the model's own, which is never run. Only "
                f"{family.model_class} is supported for {family.model_type}; take auto_map out where it is that."
            )


def check_layer_types(family: Family, config: Mapping[str, Any], architecture: GPTArchitecture, file: Path) -> None:
    """Refuse layers of more than one kind, or of another kind than `sliding_window` says.

    Raises:
        UserError: `layer_types` says anything but the architecture's kind for every layer.
    """
    types = config.get("layer_types")
    if types is None:
        return
    kind = layer_type(architecture)
    same = isinstance(types, list) and all(
        word == kind or (isinstance(word, str) and _LEGACY_LAYER_TYPES.get(word) == kind) for word in types
    )
    if not same or len(types) != architecture.num_layers:
        window = "no window" if architecture.sliding_window is None else f"a window of {architecture.sliding_window}"
        raise UserError(
            f"layer_types is {show(types)} in {file}; a {family.model_type} model with {window} is supported only with "
            f"{show(kind)} in each of its {architecture.num_layers} layers."
        )


def layer_type(architecture: GPTArchitecture) -> str:
    """The word of `layer_types` for every layer of a model."""
    return "full_attention" if architecture.sliding_window is None else "sliding_attention"


def check_token_ids(config: Mapping[str, Any], file: Path) -> None:
    """Refuse what is no token id.

    Raises:
        UserError: a key holds something else than an id, a list of them or null.
    """
    for key in TOKEN_KEYS:
        value = config.get(key)
        if value is not None and not all(is_id(token) for token in (value if isinstance(value, list) else [value])):
            raise UserError(f"{key} is {show(value)} in {file}; it must be a token id, a list of them or null.")


def is_id(value: object) -> bool:
    """Whether a value is a whole number, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)
