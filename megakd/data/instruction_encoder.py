"""The encoder of prompts with responses: a template's text with the response behind it, or a chat of two messages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megakd.common.errors import UserError
from megakd.data.chat_encoder import (
    EMPTY_RESPONSE,
    Chat,
    Conversations,
    Example,
    TemplateSettings,
    encode_examples,
    example_notes,
)
from megakd.data.chat_flags import counted, example_weight, message_weights
from megakd.data.chat_template import Message, RecordError, special_tokens
from megakd.data.offsets import OffsetTokenizer, Turn, require_offsets
from megakd.data.record_formats import HISTORY, INPUT, history_of, with_input
from megakd.data.records import (
    CONTEXT,
    MISSING_KEY,
    NO_END,
    RESPONSE,
    Encoded,
    Problem,
    Record,
    RecordEncoder,
    text_problem,
)
from megakd.data.text_encoder import special_token
from megakd.data.tokenizer import HuggingFaceTokenizer, Tokenizer

PROMPT, SYSTEM = "{prompt}", "{system}"


@dataclass(frozen=True)
class InstructionSettings:
    """An example per record: `prompt_template` with the prompt in it, the response behind it, and eos.

    The template holds "{prompt}" and perhaps "{system}", which is empty for a record without a system text. With
    `apply_chat_template` the record is instead a chat of a system, a user and an assistant message, rendered as
    `template` says, and no eos is appended: the template ends turns. `alpaca` records may have an `input`, which
    follows the prompt, a `history` of earlier turns and a system text.
    """

    prompt_key: str = "prompt"
    response_key: str = "response"
    system_key: str = "system"
    prompt_template: str = PROMPT
    append_eos: bool = True
    prepend_bos: bool = False
    apply_chat_template: bool = False
    template: TemplateSettings = TemplateSettings()
    alpaca: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        system = self.alpaca or self.apply_chat_template or SYSTEM in self.prompt_template
        more = (INPUT, HISTORY) if self.alpaca else ()
        return (self.prompt_key, self.response_key, *((self.system_key,) if system else ()), *more)

    @property
    def masks(self) -> bool:
        return True

    def build(self, tokenizer: Tokenizer) -> RecordEncoder:
        found = require_offsets(tokenizer)
        if self.apply_chat_template:
            return _ThroughChat(self, Conversations(found, self.template))
        return _Plain(self, found)

    def metadata(self) -> dict[str, Any]:
        return {
            "appended_eod": self.append_eos and not self.apply_chat_template,
            "prepended_bos": self.prepend_bos,
            "records": "prompt",
            **(self.template.metadata() if self.apply_chat_template else {"prompt_template": self.prompt_template}),
        }


class _Plain:
    def __init__(self, settings: InstructionSettings, tokenizer: HuggingFaceTokenizer) -> None:
        if PROMPT not in settings.prompt_template:
            raise UserError(
                f"--prompt-template {settings.prompt_template!r} has no {PROMPT}. Write it where the prompt goes."
            )
        self._settings = settings
        self._tokenizer = OffsetTokenizer(tokenizer)
        self._special_tokens = special_tokens(tokenizer)
        no_eos, no_bos = "Use --no-append-eod.", "Leave out --prepend-bos."
        self._tail = special_token(tokenizer, "eos", tokenizer.eos_id, no_eos) if settings.append_eos else []
        self._head = special_token(tokenizer, "bos", tokenizer.bos_id, no_bos) if settings.prepend_bos else []

    def encode(self, records: Sequence[Record]) -> list[Encoded | Problem]:
        results = encode_examples(self._tokenizer, [self._example(record) for record in records])
        return [self._framed(result) if isinstance(result, Encoded) else result for result in results]

    def _example(self, record: Record) -> Example | Problem:
        texts = _texts(record, self._settings)
        if isinstance(texts, Problem):
            return texts
        notes: dict[str, None] = {}
        try:
            weight = example_weight(record, self._settings.fields, notes)
        except RecordError as error:
            return error.problem
        prompt, response, system = texts
        problem = _without_place(record, self._settings, system)
        if problem is not None:
            return problem
        values = {PROMPT: prompt, SYSTEM: system or ""}
        before = re.sub(r"\{prompt\}|\{system\}", lambda found: values[found.group()], self._settings.prompt_template)
        text = before + response
        turns = [Turn(len(before), len(text), True, weight)]
        notes.update(dict.fromkeys(counted(weight)))
        notes.update(dict.fromkeys(example_notes(self._special_tokens, text, turns, (prompt, response, system or ""))))
        if self._settings.append_eos:
            notes.pop(NO_END, None)
        return text, turns, tuple(notes)

    def _framed(self, example: Encoded) -> Encoded:
        assert example.mask is not None
        # A prompt template may begin with bos itself.
        head = [] if self._head and example.ids[0] == self._head[0] else self._head
        ids = np.array([*head, *example.ids, *self._tail], dtype=np.int32)
        mask = np.pad(example.mask, (len(head), 0), constant_values=CONTEXT)
        mask = np.pad(mask, (0, len(self._tail)), constant_values=RESPONSE)
        weights = example.weights
        if weights is not None:
            of_response = weights[example.mask == RESPONSE][-1]
            weights = np.pad(weights, (len(head), len(self._tail)), constant_values=(1, of_response))
        return Encoded(ids, mask, example.notes, weights)


class _ThroughChat:
    def __init__(self, settings: InstructionSettings, conversations: Conversations) -> None:
        if settings.prepend_bos:
            raise UserError(
                "--prepend-bos has no use with --apply-chat-template: the template writes bos. Leave it out."
            )
        if settings.prompt_template != PROMPT:
            raise UserError("--prompt-template and --apply-chat-template exclude each other. Leave one of them out.")
        self._settings = settings
        self._conversations = conversations

    def encode(self, records: Sequence[Record]) -> list[Encoded | Problem]:
        return self._conversations.encode([self._chat(record) for record in records])

    def _chat(self, record: Record) -> Chat | Problem:
        texts = _texts(record, self._settings)
        if isinstance(texts, Problem):
            return texts
        prompt, response, system = texts
        earlier = history_of(record) if self._settings.alpaca else []
        if isinstance(earlier, Problem):
            return earlier
        messages = list(_messages([*earlier, (prompt, response)], system))
        try:
            weights = message_weights(messages, "", record, self._settings.fields)
        except RecordError as error:
            return error.problem
        return Chat(messages, weights.messages, notes=weights.notes)


def _messages(turns: Sequence[tuple[str, str]], system: str | None) -> Iterator[Message]:
    if system:
        yield {"role": "system", "content": system}
    for prompt, response in turns:
        yield {"role": "user", "content": prompt}
        yield {"role": "assistant", "content": response}


def _without_place(record: Record, settings: InstructionSettings, system: str | None) -> Problem | None:
    """What an Alpaca record says beside prompt and response that no place of the prompt template can take."""
    if not settings.alpaca:
        return None
    earlier = history_of(record)
    if isinstance(earlier, Problem):
        return earlier
    if earlier:
        detail = f"'{HISTORY}' has {len(earlier)}"
        return Problem("earlier turns without a chat template", detail, "Add --apply-chat-template")
    if system and SYSTEM not in settings.prompt_template:
        remedy = f"Add --apply-chat-template, or write {SYSTEM} into --prompt-template"
        return Problem("system text without a place", f"--prompt-template has no {SYSTEM}", remedy)
    return None


def _texts(record: Record, settings: InstructionSettings) -> tuple[str, str, str | None] | Problem:
    """The record's prompt, response and system text."""
    if settings.alpaca:
        found = with_input(record, settings.prompt_key)
        if isinstance(found, Problem):
            return found
        record = found
    for key in (settings.prompt_key, settings.response_key):
        if key not in record:
            return Problem(MISSING_KEY, f"there is no '{key}'")
        problem = text_problem(record[key], key)
        if problem is not None:
            return problem
    system = record.get(settings.system_key)
    if system is not None:
        problem = text_problem(system, settings.system_key)
        if problem is not None:
            return problem
    response: str = record[settings.response_key]
    if not response.strip():
        return EMPTY_RESPONSE
    return record[settings.prompt_key], response, system
