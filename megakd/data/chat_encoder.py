"""The encoder of conversations: the chat template's text, with the assistant's turns in the mask."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from megakd.data.assistant_spans import Span, find_assistant_spans
from megakd.data.chat_flags import message_weights
from megakd.data.chat_marks import ASSISTANT
from megakd.data.chat_template import REASONING, Conversation, Message, RecordError, load_templates
from megakd.data.offsets import OffsetTokenizer, Turn, require_offsets, turn_mask, turn_weights
from megakd.data.record_formats import as_conversation
from megakd.data.records import (
    ALL_SKIPPED,
    EARLIER,
    EMPTY_TURN,
    LEFT_OUT,
    MISSING_KEY,
    NO_END,
    RESPONSE,
    SKIPPED_LAST,
    SPECIAL_TEXT,
    UNREAD_VARIABLE,
    Encoded,
    Problem,
    Record,
    text_problem,
)
from megakd.data.span_checks import NOT_FOUND
from megakd.data.template_arguments import arguments_of, check_arguments, tools_of
from megakd.data.tokenizer import HuggingFaceTokenizer, Tokenizer

ARGUMENTS_KEY = "chat_template_kwargs"
NO_MESSAGES = "not a list of messages"
NO_ASSISTANT = Problem("no assistant message", "there is nothing to learn from")
EMPTY_RESPONSE = Problem("empty response")
Example = tuple[str, list[Turn], tuple[str, ...]]


@dataclass(frozen=True)
class TemplateSettings:
    """How conversations are rendered, besides what their records say.

    `text` is a chat template in place of the tokenizer's own; `arguments` are variables of it, and `tools` those of
    records that name none.
    """

    text: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    tools: list[Any] | None = None

    def metadata(self) -> dict[str, Any]:
        """What `<prefix>.json` says of it."""
        given = {"template_arguments": self.arguments, "tools": self.tools}
        return {"chat_template": template_name(self.text), **{key: value for key, value in given.items() if value}}


class Chat(NamedTuple):
    """A record's conversation: messages, what each weighs, its tools and template variables, and what is counted."""

    messages: list[Message]
    weights: list[float]
    tools: list[Any] | None = None
    arguments: Mapping[str, Any] = {}
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatSettings:
    """An example per conversation: a list of messages under `messages_key`, and perhaps tools under `tools_key`.

    A text under `system_key` is the conversation's first message.
    """

    messages_key: str = "messages"
    tools_key: str = "tools"
    template: TemplateSettings = TemplateSettings()
    system_key: str = "system"

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.messages_key, self.tools_key, self.system_key, ARGUMENTS_KEY)

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
            **self.template.metadata(),
        }


class ChatEncoder:
    """Built by `ChatSettings.build`."""

    def __init__(self, settings: ChatSettings, conversations: Conversations) -> None:
        self._settings = settings
        self._conversations = conversations

    def encode(self, records: Sequence[Record]) -> list[Encoded | Problem]:
        return self._conversations.encode([self._chat(record) for record in records])

    def _chat(self, record: Record) -> Chat | Problem:
        key, tools_key = self._settings.messages_key, self._settings.tools_key
        if key not in record:
            return Problem(MISSING_KEY, f"there is no '{key}'")
        converted = as_conversation(record, key, self._settings.system_key)
        if isinstance(converted, Problem):
            return converted
        messages = converted[key]
        problem = messages_problem(messages, key)
        if problem is not None:
            return problem
        try:
            tools = tools_of(record.get(tools_key), tools_key)
            arguments = arguments_of(record.get(ARGUMENTS_KEY))
            weights = message_weights(messages, key, record, self._settings.fields)
        except RecordError as error:
            return error.problem
        return Chat(messages, weights.messages, tools, arguments, weights.notes)


class Conversations:
    """Encodes conversations that have been checked; what chats and instructions through a template share."""

    def __init__(self, tokenizer: HuggingFaceTokenizer, settings: TemplateSettings) -> None:
        self._templates = load_templates(tokenizer, settings.text)
        self._settings = settings
        self._tokenizer = OffsetTokenizer(tokenizer)
        check_arguments(self._templates, settings.arguments)

    def encode(self, chats: Sequence[Chat | Problem]) -> list[Encoded | Problem]:
        """One result per conversation, in order; problems are passed on."""
        examples = [one if isinstance(one, Problem) else self._example(one) for one in chats]
        return encode_examples(self._tokenizer, examples)

    def _example(self, chat: Chat) -> Example | Problem:
        messages = chat.messages
        own = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
        if not own:
            return NO_ASSISTANT
        if _is_empty(messages[own[-1]]):
            return EMPTY_RESPONSE
        tools = self._settings.tools if chat.tools is None else chat.tools
        # transformers takes an empty list for tools that are there.
        template = self._templates[tools is not None]
        if any(isinstance(message.get("content"), list) for message in messages) and not template.takes_parts:
            messages = [_joined(message) for message in messages]
        arguments = {**self._settings.arguments, **chat.arguments}
        try:
            text, spans = find_assistant_spans(Conversation(template, messages, tools, arguments))
            turns = [_turn(span, chat.weights, own) for span in spans]
        except RecordError as error:
            return error.problem
        contents = [part for message in messages for part in _written(message)]
        notes = [*chat.notes, *example_notes(template.special_tokens, text, turns, contents)]
        if any(_is_empty(messages[number]) for number in own):
            notes.append(EMPTY_TURN)
        if not set(chat.arguments) <= template.variables:
            notes.append(UNREAD_VARIABLE)
        return text, turns, tuple(notes)


def _turn(span: Span, weights: Sequence[float], own: Sequence[int]) -> Turn:
    if span.message is not None:
        return Turn(span.start, span.end, span.message == own[-1], weights[span.message])
    if len({weights[number] for number in own}) > 1:
        raise RecordError(
            NOT_FOUND,
            "a generation block of the chat template holds no message's text, and the messages weigh differently",
        )
    return Turn(span.start, span.end, False, weights[own[0]])


def encode_examples(tokenizer: OffsetTokenizer, examples: Sequence[Example | Problem]) -> list[Encoded | Problem]:
    """Tokenise texts whole, make masks of their turns and weights; problems are passed on in their places."""
    results: list[Encoded | Problem] = []
    checked = [one if isinstance(one, Problem) else (text_problem(one[0], "text") or one) for one in examples]
    tokens = iter(tokenizer.encode_batch([one[0] for one in checked if not isinstance(one, Problem)]))
    for one in checked:
        if isinstance(one, Problem):
            results.append(one)
            continue
        found = next(tokens)
        _, turns, notes = one
        mask = turn_mask(found, turns)
        # A last turn that is flagged leaves the earlier ones to learn from.
        last_is_skipped = any(turn.last and turn.is_skipped for turn in turns)
        learned = (EARLIER, RESPONSE) if last_is_skipped else (RESPONSE,)
        if np.isin(mask, learned).any():
            notes = (*notes, SKIPPED_LAST) if last_is_skipped else notes
            results.append(Encoded(found.ids, mask, notes, turn_weights(found, turns)))
        else:
            results.append(ALL_SKIPPED if last_is_skipped else EMPTY_RESPONSE)
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
