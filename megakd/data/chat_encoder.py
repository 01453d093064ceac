"""The encoder of conversations: the chat template's text, with the assistant's turns in the mask."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megakd.data.chat_template import Message, RecordError, load_templates
from megakd.data.offsets import OffsetTokenizer, Turn, require_offsets, turn_mask
from megakd.data.records import (
    EMPTY_TURN,
    LEFT_OUT,
    MISSING_KEY,
    NO_END,
    RESPONSE,
    SPECIAL_TEXT,
    Encoded,
    Problem,
    Record,
    text_problem,
)
from megakd.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from megakd.data.turns import ASSISTANT, REASONING, find_turns

NO_MESSAGES = "not a list of messages"
NO_ASSISTANT = Problem("no assistant message", "there is nothing to learn from")
EMPTY_RESPONSE = Problem("empty response")
Example = tuple[str, list[Turn], tuple[str, ...]]


@dataclass(frozen=True)
class ChatSettings:
    """An example per conversation: a list of messages under `messages_key`, and perhaps tools under `tools_key`.

    `template` is the text of a chat template in place of the tokenizer's own.
    """

    messages_key: str = "messages"
    tools_key: str = "tools"
    template: str | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.messages_key, self.tools_key)

    @property
    def masks(self) -> bool:
        return True

    def build(self, tokenizer: Tokenizer) -> ChatEncoder:
        return ChatEncoder(self, Conversations(require_offsets(tokenizer), self.template))

    def metadata(self) -> dict[str, Any]:
        return {
            "appended_eod": False,
            "prepended_bos": False,
            "records": "messages",
            "chat_template": template_name(self.template),
        }


class ChatEncoder:
    """Built by `ChatSettings.build`."""

    def __init__(self, settings: ChatSettings, conversations: Conversations) -> None:
        self._settings = settings
        self._conversations = conversations

    def encode(self, records: Sequence[Record]) -> list[Encoded | Problem]:
        return self._conversations.encode([self._messages(record) for record in records])

    def _messages(self, record: Record) -> tuple[list[Message], list[Any] | None] | Problem:
        key, tools_key = self._settings.messages_key, self._settings.tools_key
        if key not in record:
            return Problem(MISSING_KEY, f"there is no '{key}'")
        messages, tools = record[key], record.get(tools_key)
        problem = messages_problem(messages, key)
        if problem is None and tools is not None and not isinstance(tools, list):
            problem = Problem("tools are no list", f"'{tools_key}' is a {type(tools).__name__}")
        return problem or (messages, tools)


class Conversations:
    """Encodes conversations that have been checked; what chats and instructions through a template share."""

    def __init__(self, tokenizer: HuggingFaceTokenizer, template: str | None) -> None:
        self._templates = load_templates(tokenizer, template)
        self._tokenizer = OffsetTokenizer(tokenizer)

    def encode(
        self, conversations: Sequence[tuple[list[Message], list[Any] | None] | Problem]
    ) -> list[Encoded | Problem]:
        """One result per conversation, in order; problems are passed on."""
        examples = [one if isinstance(one, Problem) else self._example(*one) for one in conversations]
        return encode_examples(self._tokenizer, examples)

    def _example(self, messages: list[Message], tools: list[Any] | None) -> Example | Problem:
        last = next((message for message in reversed(messages) if message["role"] == ASSISTANT), None)
        if last is None:
            return NO_ASSISTANT
        if _is_empty(last):
            return EMPTY_RESPONSE
        # transformers takes an empty list for tools that are there.
        template = self._templates[tools is not None]
        if any(isinstance(message.get("content"), list) for message in messages) and not template.takes_parts:
            messages = [_joined(message) for message in messages]
        try:
            text, turns = find_turns(template, messages, tools)
        except RecordError as error:
            return error.problem
        contents = [part for message in messages for part in _written(message)]
        notes = example_notes(template.special_tokens, text, turns, contents)
        if any(message["role"] == ASSISTANT and _is_empty(message) for message in messages):
            notes = (*notes, EMPTY_TURN)
        return text, turns, notes


def encode_examples(tokenizer: OffsetTokenizer, examples: Sequence[Example | Problem]) -> list[Encoded | Problem]:
    """Tokenise texts whole and make masks of their turns; problems are passed on in their places."""
    results: list[Encoded | Problem] = []
    checked = [one if isinstance(one, Problem) else (text_problem(one[0], "text") or one) for one in examples]
    tokens = iter(tokenizer.encode_batch([one[0] for one in checked if not isinstance(one, Problem)]))
    for one in checked:
        if isinstance(one, Problem):
            results.append(one)
            continue
        found = next(tokens)
        mask = turn_mask(found, one[1])
        results.append(Encoded(found.ids, mask, one[2]) if (mask == RESPONSE).any() else EMPTY_RESPONSE)
    return results


def example_notes(
    special_tokens: tuple[str, ...], text: str, turns: Sequence[Turn], contents: Sequence[str]
) -> tuple[str, ...]:
    """What the summary counts the example by; `contents` are the record's own texts."""
    pattern = _any_of(special_tokens)
    found = {
        NO_END: not all(text[turn.start : turn.end].rstrip().endswith(special_tokens) for turn in turns),
        LEFT_OUT: not all(_has(text, content.strip()) for content in contents),
        SPECIAL_TEXT: pattern is not None and any(pattern.search(content) for content in contents),
    }
    return tuple(note for note, holds in found.items() if holds)


def messages_problem(messages: object, key: str) -> Problem | None:
    """What keeps a value from being a conversation that a chat template takes, or None."""
    if not isinstance(messages, list) or not messages:
        return Problem(NO_MESSAGES, f"'{key}' is {'empty' if messages == [] else f'a {type(messages).__name__}'}")
    for number, message in enumerate(messages):
        name = f"{key}[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return Problem(NO_MESSAGES, f'\'{name}\' has no role; write {{"role": ..., "content": ...}}')
        if "content" not in message and not message.get("tool_calls"):
            return Problem(NO_MESSAGES, f"'{name}' has no content")
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, list):
            return Problem("unknown content", f"'{name}' has a {type(content).__name__} as content, not text")
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                return Problem("unknown content", f"'{name}' has a part of type {kind!r}; only text can be learned")
    return None


def _has(text: str, content: str) -> bool:
    """Whether the text holds the content, as it is or in a JSON string."""
    return content in text or any(json.dumps(content, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True))


def _is_empty(message: Message) -> bool:
    return not any(text.strip() for text in _written(message)) and not message.get("tool_calls")


def template_name(template: str | None) -> str:
    """What metadata calls a template: "tokenizer" for the tokenizer's own, else the hash of its text."""
    return "tokenizer" if template is None else f"sha256:{hashlib.sha256(template.encode()).hexdigest()}"


def _joined(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": "".join(part["text"] for part in content)} if isinstance(content, list) else message


def _written(message: Message) -> Iterator[str]:
    content = message.get("content")
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        yield from (part["text"] for part in content)
    yield from (message[key] for key in REASONING if isinstance(message.get(key), str))


@lru_cache(maxsize=8)
def _any_of(texts: tuple[str, ...]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, texts))) if texts else None
