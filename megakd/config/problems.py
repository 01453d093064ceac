"""From pydantic's report to one line for the person who wrote the configuration."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

_LONGEST_VALUE = 80
_KINDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_unicode": "text without halves of characters",
    "list_type": "a list",
    "finite_number": "finite",
}


def first_problem(error: ValidationError, values: Mapping[str, Any], root: type[BaseModel]) -> str:
    """One line for the most telling problem: an unknown key may be why another is missing, so it comes first."""

    def rank(problem: ErrorDetails) -> int:
        return {"extra_forbidden": 0, "invalid_key": 0, "missing": 2}.get(problem["type"], 1)

    problem = min(error.errors(), key=rank)
    line = _describe(problem, values, root)
    return " ".join(line.split())


def show(value: object) -> str:
    """A value as a YAML file has it, on one line, shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"
    if isinstance(value, Mapping):
        return "a mapping"
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write out an integer of thousands of digits
        return "a huge number"
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def _describe(problem: ErrorDetails, values: Mapping[str, Any], root: type[BaseModel]) -> str:
    location, kind = problem["loc"], problem["type"]
    if kind == "invalid_key":
        location = (*location[:-1], str(location[-1]))
    key = _join(location)
    if kind in ("extra_forbidden", "invalid_key"):
        return f"{key} is not a setting.{_hint(location, root)}"
    field = _find(location, root)
    if kind == "missing":
        return f"{key} is missing. {_what_to_write(field)}"
    if kind == "value_error":
        return f"{key}: {problem['ctx']['error']}."
    # What a key is for helps who gave a wrong value, hardly who gave a wrong type.
    purpose = "" if kind in _KINDS else _purpose(field)
    return f"{key} is {show(_value_at(location, values))}; it must be {_rule(problem, field)}.{purpose}"


def _rule(problem: ErrorDetails, field: FieldInfo | None) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind in _KINDS:
        return _KINDS[kind]
    if kind == "model_type":
        section = _section(field)
        assert section is not None, problem
        return f"a section with keys such as {_names(_keys(section))}"
    if kind == "literal_error":
        return f"{context['expected']}"
    if kind in ("string_too_short", "too_short"):
        return f"at least {context['min_length']} {'character' if kind == 'string_too_short' else 'entry'} long"
    bounds = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    for bound, words in bounds.items():
        if bound in context:
            return f"{words} {context[bound]:.15g}"
    return f"valid ({problem['msg']})"


def _purpose(field: FieldInfo | None) -> str:
    """What the key is for, in brackets, where the schema says so."""
    return f" ({field.description.rstrip('.')}.)" if field is not None and field.description else ""


def _what_to_write(field: FieldInfo | None) -> str:
    section = _section(field)
    if section is not None and not (field is not None and field.description):
        keys = [name for name, f in section.model_fields.items() if f.is_required()] or _keys(section)
        return f"Add it, with {_names(keys)}."
    return f"Set it.{_purpose(field)}"


def _hint(location: Sequence[int | str], root: type[BaseModel]) -> str:
    """Where an unknown key belongs: a near name in its section, the same or a near name elsewhere, else the choice."""
    *parents, name = location
    section = root if not parents else _section(_find(parents, root))
    assert section is not None, location
    here = {key: _join([*parents, key]) for key in _keys(section)}
    everywhere: dict[str, str] = {}
    for path in _leaves(root, ()):
        everywhere.setdefault(path[-1], _join(path))
    for candidates, cutoff in ((here, 0.6), (everywhere, 0.7)):
        found = difflib.get_close_matches(str(name), candidates, n=1, cutoff=cutoff)
        if found:
            return f" Did you mean '{candidates[found[0]]}'?"
    holder = f"{_join(parents)} has" if parents else "There are"
    return f" {holder} {_names(_keys(section))}."


def _leaves(section: type[BaseModel], prefix: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Paths of all keys below a section, itself excluded."""
    for name, field in section.model_fields.items():
        below = _section(field)
        if below is None:
            yield (*prefix, name)
        else:
            yield from _leaves(below, (*prefix, name))


def _find(location: Sequence[int | str], root: type[BaseModel]) -> FieldInfo | None:
    """The field at a path; None for an entry of a list of plain values."""
    section: type[BaseModel] | None = root
    field = None
    for part in location:
        if section is None:
            return None
        if isinstance(part, str):
            field = section.model_fields[part]
        else:
            # An entry of a list of sections is described by what the list holds.
            field = FieldInfo(annotation=section)
        section = _section(field)
    return field


def _section(field: FieldInfo | None) -> type[BaseModel] | None:
    """The model that a field holds, also where it may be null or is a list of them."""
    return None if field is None else section_of(field.annotation)


def section_of(annotation: object) -> type[BaseModel] | None:
    """The model in a field's type: itself, or one that may be null, or what a list holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, list, Annotated):
        return next((model for model in map(section_of, get_args(annotation)) if model is not None), None)
    return None


def _keys(section: type[BaseModel]) -> list[str]:
    return list(section.model_fields)


def _names(keys: Sequence[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"


def _join(location: Sequence[int | str]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _value_at(location: Sequence[int | str], values: Any) -> object:
    for part in location:
        if isinstance(part, int) and not isinstance(values, list | tuple):
            continue  # one entry may stand for a list of it
        values = getattr(values, str(part)) if isinstance(values, BaseModel) else values[part]
    return values
