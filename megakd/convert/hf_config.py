"""config.json to GPTArchitecture, in the words of transformers 4 and 5."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megakd.common.errors import UserError
from megakd.config.architecture import GPTArchitecture
from megakd.convert.families import family_of_config
from megakd.convert.hf_checks import (
    check_layer_types,
    check_model_class,
    check_no_adapter,
    check_only,
    check_token_ids,
    is_id,
    show,
)
from megakd.convert.hf_rope import read_rope
from megakd.convert.table import Family

# Of a tensor's sizes.
_LARGEST = 2**63 - 1


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
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}). Download or save it again.") from error
    except RecursionError as error:
        raise UserError(f"{file} is nested too deeply for a config.json. Download or save it again.") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} must hold a JSON object.")
    return config


def generation_end_ids(path: str | Path) -> tuple[tuple[int, ...], Path]:
    """Ids at which transformers' `generate` ends a text of a folder's model, and the file that says so.

    That is generation_config.json, and config.json where there is no such file, or none that can be read.

    Raises:
        UserError: there is no config.json.
    """
    config, file = read_hf_config(path), Path(path) / "config.json"
    own = Path(path) / "generation_config.json"
    with suppress(OSError, ValueError, RecursionError):
        generation = json.loads(own.read_text(encoding="utf-8"))
        if isinstance(generation, dict):
            config, file = generation, own
    said = config.get("eos_token_id")
    ids: list[Any] = said if isinstance(said, list) else [said]
    return tuple(index for index in ids if is_id(index)), file


def architecture_from_hf(path: str | Path) -> GPTArchitecture:
    """The architecture of a Hugging Face folder's model.

    Raises:
        UserError: the model's family has no table, or config.json asks for what megatron-core would not compute
            exactly.
    """
    config, file = read_hf_config(path), Path(path) / "config.json"
    family = family_of_config(config, file)
    check_no_adapter(Path(path))
    check_model_class(family, config, file)
    check_only(family, config, file)
    check_token_ids(config, file)
    found: dict[str, Any] = {}
    for field in family.fields:
        found[field] = _read_field(family, field, config, found, file)
        if isinstance(found[field], int) and abs(found[field]) > _LARGEST:
            raise UserError(
                f"{family.fields[field].names[0]} is {show(found[field])} in {file}; it must be at most {_LARGEST}."
            )
    values: dict[str, Any] = {field: value for field, value in found.items() if value is not None}
    values.update(family.fixed)
    if values["position_embedding_type"] == "rope":
        values.update(read_rope(family, config, values["max_position_embeddings"], file))
    try:
        # Strictly: transformers takes neither true nor "64" for a number.
        architecture = GPTArchitecture.model_validate(values, strict=True)
    except ValidationError as error:
        raise UserError(_explain(error, family, file)) from error
    check_layer_types(family, config, architecture, file)
    return architecture


def _read_field(family: Family, field: str, config: Mapping[str, Any], found: Mapping[str, Any], file: Path) -> Any:
    key = family.fields[field]
    said = {
        name: config[name]
        for name in (*key.names, *key.aliases)
        if name in config and (key.null or config[name] is not None)
    }
    default = key.default(found) if callable(key.default) else key.default
    absent = next((said[name] for name in key.aliases if name in said), default)
    name, value = key.names[0], said.get(key.names[0], absent)
    for other in (*key.names[1:], *(alias for alias in key.aliases if alias in said)):
        if said.get(other, absent) != value:
            raise UserError(
                f"{name} is {show(value)} and {other} is {show(said.get(other, absent))} in {file}; they are supported "
                "only where they are equal."
            )
    if value is None and not key.null:
        raise UserError(f"{file} has no {name}, which a {family.model_type} model needs.")
    if key.words is None or value is None:
        return value
    for ours, theirs in key.words.items():
        if value == theirs and type(value) is type(theirs):
            return ours
    raise UserError(
        f"{name} is {show(value)} in {file}; only {', '.join(show(word) for word in key.words.values())} are "
        f"supported for {family.model_type}."
    )


def _explain(error: ValidationError, family: Family, file: Path) -> str:
    first = error.errors()[0]
    if not first["loc"]:
        return f"{file}: {first['msg'].removeprefix('Value error, ')}"
    field = str(first["loc"][0])
    key = family.fields[field].names[0] if field in family.fields else field
    key = {"rotary_base": "rope_theta", "rotary_percent": "partial_rotary_factor"}.get(key, key)
    return f"{key} is {show(first['input'])} in {file}; it must{first['msg'].removeprefix('Input should')}."
