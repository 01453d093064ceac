"""From a YAML file and command-line overrides to a Config, and back to YAML; every failure is one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megakd.common.errors import UserError, nearest
from megakd.config.problems import first_problem, show
from megakd.config.schema import Config
from megakd.config.yaml_text import format_yaml, parse_yaml


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, put `section.key=value` overrides on top (the value is YAML), and validate.

    Relative paths in the configuration stay as they are: they are relative to the current working directory.

    Raises:
        UserError: the first problem of the file or of an override, in one line.
    """
    values = read_mapping(Path(path), f"a mapping of sections ({', '.join(Config.model_fields)})")
    for override in overrides:
        _apply_override(values, override)
    return config_from_dict(values)


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """Validate a configuration given as nested mappings; see load_config."""
    filled = {key: {} if value is None and _is_plain_section(key) else value for key, value in values.items()}
    try:
        return Config.model_validate(_with_whole_numbers(filled), strict=True)
    except ValidationError as error:
        raise UserError(first_problem(error, filled, Config)) from error
    except RecursionError as error:
        raise UserError("the configuration refers to itself. Remove the YAML alias that does.") from error


def dump_config(config: Config) -> str:
    """The whole configuration, defaults included, as YAML that loads back to an equal one."""
    return format_yaml(config.model_dump())


def dotted_settings(config: Config) -> dict[str, Any]:
    """Every setting by its dotted key, defaults included, with values that JSON has."""
    settings: dict[str, Any] = {}

    def collect(value: Any, key: str) -> None:
        if isinstance(value, Mapping) and value:
            for name, entry in value.items():
                collect(entry, f"{key}.{name}" if key else str(name))
        else:
            settings[key] = value

    collect(config.model_dump(mode="json"), "")
    return settings


def config_schema() -> dict[str, Any]:
    """The JSON schema of configuration files, for editors that complete and check YAML."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def read_mapping(path: Path, wanted: str) -> dict[str, Any]:
    """What a YAML file of keys and values holds; `wanted` says in errors what it should be.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.parent
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        raise UserError(f"{path} does not exist; give a YAML file.{nearest(path.name, names)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; give a YAML file.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a YAML file.") from error
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        found = "nothing" if values is None else show(values)
        raise UserError(f"{path} holds {found}; it must hold {wanted}.")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Set one key in place, with the sections above it where they are absent or null."""
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise UserError(f"'{' '.join(override.split())}' is not an override; write section.key=value.")
    *parents, name = parts
    section = values
    for depth, parent in enumerate(parents, 1):
        if section.get(parent) is None:
            section[parent] = {}
        # A mapping that YAML aliases share is changed for this key alone.
        below = section[parent] = dict(section[parent]) if isinstance(section[parent], dict) else section[parent]
        if not isinstance(below, dict):
            path = ".".join(parents[:depth])
            raise UserError(f"{key.strip()} cannot be set: {path} is {show(below)}, not a section. Set {path} itself.")
        section = below
    section[name] = parse_yaml(text, f"the value of override '{key.strip()}'")


def _is_plain_section(key: str) -> bool:
    """Whether null stands for a section whose keys were all left out, not for "none"."""
    field = Config.model_fields.get(key)
    return field is not None and (field.is_required() or field.default is not None)


def _with_whole_numbers(value: Any) -> Any:
    """A copy with 1e9 and 2.0 as integers, which strict validation still takes where a number may have a fraction."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: _with_whole_numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_with_whole_numbers(entry) for entry in value]
    return value
