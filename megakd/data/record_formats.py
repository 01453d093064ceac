"""Records as other programs write them: ShareGPT's conversations and Alpaca's instructions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megakd.data.records import Problem, Record, text_problem

# The keys under which a list of messages is looked for.
CONVERSATION_KEYS = ("messages", "conversations", "conversation")
INPUT, HISTORY = "input", "history"

# Who a ShareGPT message is `from`, and the role that chat templates know for it.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
FUNCTION_CALL = "function_call"
WRONG_CALL = "function call that is none"
WRONG_HISTORY = "history that is no list of turns"


def is_sharegpt(messages: object) -> bool:
    """Return whether a list of messages says `from` whom they are, and not of which role."""
    first = messages[0] if isinstance(messages, list) and messages else None
    return isinstance(first, dict) and "from" in first and "role" not in first


def as_conversation(record: Record, key: str, system_key: str) -> Record | Problem:
    """Return the record with messages of `role` and `content` under `key`, the record's system text first.

    Messages written with `from` and `value` are converted, and keep all other keys; others are kept as they are, right
    or wrong. A text under `system_key` becomes the first message, unless that says the same already.
    """
    messages = record[key]
    if not isinstance(messages, list):
        return record
    converted = []
    for number, message in enumerate(messages):
        one = _as_message(message, f"{key}[{number}]")
        if isinstance(one, Problem):
            return one
        converted.append(one)
    system = record.get(system_key)
    if system is not None:
        problem = text_problem(system, system_key)
        if problem is not None:
            return problem
        first = converted[0] if converted and isinstance(converted[0], dict) else {}
        if first.get("role") != "system":
            converted = [{"role": "system", "content": system}] * bool(system.strip()) + converted
        elif system.strip() and first.get("content") != system:
            return Problem("two system texts", f"'{system_key}' says another than the first message")
    return {**record, key: converted}


def _as_message(message: Any, name: str) -> Any:
    """The message with `role` and `content` for `from` and `value`, or what keeps it from that; others as they are."""
    if not isinstance(message, dict) or "from" not in message or "role" in message:
        return message
    sender = message["from"]
    role = ROLES.get(sender) if isinstance(sender, str) else None
    if role is None:
        return Problem("unknown role", f"'{name}' is from {sender!r}; known are {', '.join(ROLES)}")
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    content = message.get("value", message.get("content"))
    if content is None:  # which a template would write as "None"
        return Problem("message without a value", f"'{name}' has no 'value'")
    if sender != FUNCTION_CALL:
        return {"role": role, "content": content, **rest}
    calls = _tool_calls(content, name)
    return calls if isinstance(calls, Problem) else {"role": role, "content": "", "tool_calls": calls, **rest}


def _tool_calls(value: object, name: str) -> list[dict[str, Any]] | Problem:
    """The tool calls of a `function_call`: `{"name": ..., "arguments": ...}` or a list of such, as JSON text or not."""
    found = _from_json(value)
    calls = []
    for call in found if isinstance(found, list) else [found]:
        function = call.get("name") if isinstance(call, Mapping) else None
        arguments = _from_json(call.get("arguments", {})) if isinstance(call, Mapping) else None
        if not isinstance(function, str) or not isinstance(arguments, dict):
            return Problem(WRONG_CALL, f'\'{name}\' is not JSON such as {{"name": "f", "arguments": {{"x": 1}}}}')
        calls.append({"type": "function", "function": {"name": function, "arguments": arguments}})
    return calls or Problem(WRONG_CALL, f"'{name}' is an empty list")


def _from_json(value: object) -> Any:
    """The value that a text holds as JSON, None where it holds none; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def with_input(record: Record, key: str) -> Record | Problem:
    """Return the Alpaca record with its `input`, if it has one, on a new line behind the instruction under `key`.

    That is how LLaMA-Factory puts them together.
    """
    more = record.get(INPUT)
    if more is None or more == "" or key not in record:
        return record
    for name in (key, INPUT):
        problem = text_problem(record[name], name)
        if problem is not None:
            return problem
    return {**record, key: "\n".join(text for text in (record[key], more) if text)}


def history_of(record: Record) -> list[tuple[str, str]] | Problem:
    """Return an Alpaca record's earlier turns, each a prompt with its response; empty where it has none."""
    history = record.get(HISTORY)
    turns: list[tuple[str, str]] = []
    if history is None or history == "":
        return turns
    if not isinstance(history, list):
        return Problem(WRONG_HISTORY, f"'{HISTORY}' is a {type(history).__name__}; write [[prompt, response], ...]")
    for number, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2:
            return Problem(WRONG_HISTORY, f"'{HISTORY}[{number}]' is not [prompt, response]")
        problem = text_problem(turn[0], f"{HISTORY}[{number}][0]") or text_problem(turn[1], f"{HISTORY}[{number}][1]")
        if problem is not None:
            return problem
        turns.append((turn[0], turn[1]))
    return turns
