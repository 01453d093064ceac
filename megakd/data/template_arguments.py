"""What a chat template is given beside the messages: variables such as enable_thinking, and tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megakd.common.errors import UserError
from megakd.data.chat_template import ChatTemplate, RecordError

WRONG_ARGUMENTS = "wrong template variables"
WRONG_TOOLS = "tools are no list"
_TOOLS_REMEDY = "Give a JSON file with a list of tools."
# What transformers' apply_chat_template and its templates have for themselves.
_RESERVED = frozenset(
    ("messages", "conversation", "conversations", "tools", "chat_template", "add_generation_prompt")
    + ("continue_final_message", "tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask")
    + ("padding", "truncation", "max_length", "tokenizer_kwargs", "sanitize_control_tokens", "strftime_now")
    + ("raise_exception", "bos_token", "eos_token", "unk_token", "pad_token", "namespace", "range", "dict", "loop")
)


def parse_arguments(given: Sequence[str]) -> dict[str, Any]:
    """Read `name=value` of a command line; values as YAML has them, so that true is a truth value and 3 a number.

    Raises:
        UserError: no name or no value, a name twice, or one that the template has from elsewhere.
    """
    arguments: dict[str, Any] = {}
    for one in given:
        name, sign, text = one.partition("=")
        if not sign or not name.isidentifier():
            raise UserError(
                f"--template-argument {one}: it must be name=value. Write, for example, enable_thinking=false."
            )
        if name in arguments:
            raise UserError(f"--template-argument {name} is given twice. Leave one of them out.")
        if name in _RESERVED:
            raise UserError(
                f"--template-argument {name}: the template has it from the record or the tokenizer. Leave it out."
            )
        try:
            value = yaml.safe_load(text)
            # What JSON does not have, such as a date, is its text.
            arguments[name] = json.loads(json.dumps(value, default=str))
        except yaml.YAMLError as error:
            raise UserError(
                f"--template-argument {one}: the value is no YAML. Put a text with special characters in quotes."
            ) from error
    return arguments


def read_tools(path: str) -> list[Any]:
    """Read a JSON file of tools, for records that name none.

    Raises:
        UserError: it cannot be read, or is no list.
    """
    try:
        return tools_of(json.loads(Path(path).read_text(encoding="utf-8")), path) or []
    except OSError as error:
        raise UserError(
            f"--tools {path}: cannot be read ({error.strerror}). Give a JSON file with a list of tools."
        ) from error
    except (ValueError, RecordError) as error:
        raise UserError(f"--tools {path}: {error}. {_TOOLS_REMEDY}") from error


def check_arguments(templates: Sequence[ChatTemplate], arguments: Mapping[str, Any]) -> None:
    """Raise UserError for a variable that no template reads: it would have no effect."""
    read = frozenset().union(*(template.variables for template in templates)) - _RESERVED
    for name in arguments:
        if name not in read:
            others = ", ".join(sorted(read)) or "none"
            raise UserError(
                f"--template-argument {name} has no effect: the chat template does not read it (it reads: {others}). "
                "Correct the name, or leave it out."
            )


def tools_of(value: object, name: str) -> list[Any] | None:
    """A record's tools: a list, or the JSON text of one, as tables keep it; None where there are none.

    Raises RecordError where it is neither.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RecordError(WRONG_TOOLS, f"'{name}' is a text that is no JSON ({error})") from error
    if value is None or value == "":
        return None
    if not isinstance(value, list):
        raise RecordError(WRONG_TOOLS, f"'{name}' is a {type(value).__name__}")
    return value


def arguments_of(value: object) -> Mapping[str, Any]:
    """A record's template variables. Raises RecordError where they are none, or name what the record has otherwise."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RecordError(WRONG_ARGUMENTS, f"'chat_template_kwargs' is a {type(value).__name__}, not an object")
    wrong = next((name for name in value if name in _RESERVED), None)
    if wrong is not None:
        raise RecordError(WRONG_ARGUMENTS, f"'chat_template_kwargs' has '{wrong}', which the record gives otherwise")
    # A table has every name in every row.
    return {name: one for name, one in value.items() if one is not None}
