"""Which characters of a rendered conversation the assistant wrote, found without knowing the template."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from megakd.data.chat_template import ChatTemplate, Message, RecordError
from megakd.data.offsets import Turn

ASSISTANT = "assistant"
# The names under which templates read what a model thought before it answered.
REASONING = ("reasoning_content", "reasoning", "thinking")
NOT_FOUND = "assistant's turn not found"


def find_turns(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Any] | None
) -> tuple[str, list[Turn]]:
    """The conversation's text and the assistant's turns in it, in order, the last of them marked as such.

    A turn is all that follows the header the template writes for a model to go on from, up to and with the mark that
    ends the turn, without spaces and newlines behind that. Raises RecordError where it cannot be known.
    """
    if template.has_blocks:
        return _turns_of_blocks(template, messages, tools)
    text = template.render(messages, tools)
    conversation = _Conversation(template, messages, tools, text, _mark(template, messages, tools, text))
    turns: list[Turn] = []
    places = [place for place, message in enumerate(messages) if message["role"] == ASSISTANT]
    for place in places:
        after = turns[-1].end if turns else 0
        start = conversation.start(place, after)
        end = conversation.end(place, start)
        turns.append(Turn(start, end, place == places[-1]))
    return text, turns


def _turns_of_blocks(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Any] | None
) -> tuple[str, list[Turn]]:
    text = template.render(messages, tools)
    tracked, blocks = template.render_blocks(messages, tools)
    if tracked != text:
        raise RecordError(NOT_FOUND, "the chat template writes another text when it is asked for its generation blocks")
    last = max(place for place, message in enumerate(messages) if message["role"] == ASSISTANT)
    earlier = len(template.render_blocks(messages[:last], tools)[1]) if len(blocks) > 1 else 0
    if earlier >= len(blocks):
        raise RecordError(NOT_FOUND, "the chat template has no generation block for the last assistant message")
    return text, [Turn(start, end, number >= earlier) for number, (start, end) in enumerate(blocks)]


class _Marks(NamedTuple):
    """Messages with marks in them, where those are in the text they render to, and whether they enclose outer spaces.

    A message's three marks are characters: before its content, behind it, and in its last tool call.
    """

    messages: list[Message]
    positions: dict[str, int]
    characters: dict[int, tuple[str, str, str]]
    pattern: re.Pattern[str]
    outer: bool


class _Conversation(NamedTuple):
    template: ChatTemplate
    messages: Sequence[Message]
    tools: Sequence[Any] | None
    text: str
    marks: _Marks

    def start(self, place: int, after: int) -> int:
        """Where the turn of message `place` begins, at or behind the character `after`."""
        message = self.messages[place]
        content = self._position(place, 0)
        call = self._position(place, 2)
        bound = min(len(self.text) if at is None else at for at in (content, call))
        if self.template.has_prompt:
            prompt = self._try(self.messages[:place], self.tools, prompt=True)
            if prompt is not None and after <= len(prompt) <= bound and self.text.startswith(prompt):
                return len(prompt)
        if content is not None and not _reasons(message):
            return (
                content if self.template.has_prompt else max(after, content - self._unprompted_spaces(place, content))
            )
        return self._start_by_probe(place, after, bound)

    def end(self, place: int, start: int) -> int:
        """Where the turn of message `place` ends, which begins at `start`."""
        content = max(start, self._content_end(place) or 0)
        if place == len(self.messages) - 1:
            return max(content, content + len(self._turn_end(self.text[content:], start)))
        anchors = [mark for mark in self.marks.characters.get(place, ())[1:] if mark in self.marks.positions]
        if anchors:
            alone = self.template.render(self.marks.messages[: place + 1], self.tools)
            anchor = max(anchors, key=lambda mark: self.marks.positions[mark])
            if alone.count(anchor) == 1:
                tail = self._turn_end(self.marks.pattern.sub("", alone[alone.index(anchor) :]), start)
                position = self.marks.positions[anchor]
                return max(content, position + self._common(tail, position))
        alone = self.template.render(self.messages[: place + 1], self.tools)
        if alone[:start] == self.text[:start]:
            common = self._common(self._turn_end(alone[start:], start), start)
            if common:
                return max(content, start + common)
        raise RecordError(
            NOT_FOUND,
            f"the end of message {place} cannot be told: the chat template writes it differently when it is the last",
        )

    def _turn_end(self, tail: str, start: int) -> str:
        """What belongs to the turn of what is written behind its text at the end of a conversation.

        A template that writes the header of a next answer unasked has it before this turn too. Where all of the tail
        stands there, the user's turn ends as the assistant's does, with the first special token.
        """
        before = self.text[:start]
        if not self.template.has_prompt and (header := _common_suffix(before, tail)).strip():
            if len(header) < len(tail):
                return tail[: -len(header)].rstrip()
            ends = [tail.find(token) + len(token) for token in self.template.special_tokens if token in tail]
            return tail[: min(ends, default=len(tail))].rstrip()
        return tail.rstrip()

    def _common(self, whole: str, position: int) -> int:
        """How many characters of the end of the turn as the last one follow `position` in the text too."""
        if self.text.startswith(whole, position):
            return len(whole)
        common = os.path.commonprefix([whole, self.text[position : position + len(whole)]])
        # What begins alike by accident, such as "<|end" and "<|user|>", is cut off behind the last special token.
        ends = [common.rfind(token) + len(token) for token in self.template.special_tokens if token in common]
        return max(ends, default=0)

    def _content_end(self, place: int) -> int | None:
        """Where the content ends in the text, with those of its last spaces that the template keeps."""
        position = self._position(place, 1)
        if position is None or self.marks.outer:
            return position
        content = _texts(self.messages[place])[-1]
        spaces = content[len(content.rstrip()) :]
        return position + len(os.path.commonprefix([spaces, self.text[position : position + len(spaces)]]))

    def _unprompted_spaces(self, place: int, content: int) -> int:
        """How many spaces before the content a template without generation prompts leaves to the model.

        They are no header: given the conversation up to here, which ends in the same word, the model has to write them.
        """
        before = self._try(self.messages[:place], self.tools)
        word = self.text[:content].rstrip()
        spaces = self.text[len(word) : content]
        if before is None or not spaces or before.split()[-1:] != word[-len(before) :].split()[-1:]:
            return 0
        written = before[len(before.rstrip()) :]
        return len(spaces) - len(written) if spaces.startswith(written) else 0

    def _start_by_probe(self, place: int, after: int, bound: int) -> int:
        """What the template writes before another content in this place, where the text has that too."""
        mark = _spare_characters(self.text, 1)[0]
        # Tools may stand before the last question, and so elsewhere in a conversation that ends here.
        for rest, tools in ((self.messages[place + 1 :], self.tools), ((), self.tools), ((), None)):
            # A header that changes with the content is none.
            header, other = (self._before(mark, place, rest, tools, mark + more) for more in ("", " and other words\n"))
            if header is None or header != other:
                continue
            for candidate in (header, header.rstrip()):
                if after <= len(candidate) <= bound and self.text.startswith(candidate):
                    return len(candidate)
        raise RecordError(
            NOT_FOUND,
            f"the start of message {place} cannot be told: the chat template changes its content and writes no header "
            "that is in the text. Use a template with {% generation %} (--chat-template)",
        )

    def _before(
        self, mark: str, place: int, rest: Sequence[Message], tools: Sequence[Any] | None, content: str
    ) -> str | None:
        rendered = self._try([*self.messages[:place], {"role": ASSISTANT, "content": content}, *rest], tools)
        return rendered[: rendered.index(mark)] if rendered is not None and rendered.count(mark) == 1 else None

    def _position(self, place: int, which: int) -> int | None:
        marks = self.marks.characters.get(place)
        return None if marks is None else self.marks.positions.get(marks[which])

    def _try(self, messages: Sequence[Message], tools: Sequence[Any] | None, *, prompt: bool = False) -> str | None:
        """The rendering, or None where the template refuses such a conversation."""
        try:
            return self.template.render(messages, tools, prompt=prompt)
        except RecordError:
            return None


def _mark(template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Any] | None, text: str) -> _Marks:
    """Marks that change nothing in what the template writes otherwise; as few as that takes, perhaps none."""
    places = [place for place, message in enumerate(messages) if message["role"] == ASSISTANT]
    spare = _spare_characters(text, 3 * len(places))
    characters = {place: (spare[3 * n], spare[3 * n + 1], spare[3 * n + 2]) for n, place in enumerate(places)}
    pattern = re.compile("[" + "".join(spare) + "]")
    has_spaces = any(content != content.strip() for place in places for content in _texts(messages[place]))
    for outer in (True, False) if has_spaces else (True,):
        marked = [
            _marked(message, characters[place], outer) if place in characters else message
            for place, message in enumerate(messages)
        ]
        try:
            rendered = template.render(marked, tools)
        except RecordError:
            continue
        if pattern.sub("", rendered) != text:
            continue
        return _Marks(marked, dict(_positions(rendered, pattern)), characters, pattern, outer)
    return _Marks(list(messages), {}, {}, pattern, False)


def _marked(message: Message, marks: tuple[str, str, str], outer: bool) -> Message:
    changed = dict(message)
    content = message.get("content")
    before, behind, call = marks
    if isinstance(content, str) and content.strip():
        changed["content"] = _put(_put(content, before, outer, first=True), behind, outer, first=False)
    elif isinstance(content, list):
        filled = [number for number, part in enumerate(content) if part["text"].strip()]
        if filled:
            parts = [dict(part) for part in content]
            for number, mark in ((filled[0], before), (filled[-1], behind)):
                parts[number]["text"] = _put(parts[number]["text"], mark, outer, first=mark == before)
            changed["content"] = parts
    calls = message.get("tool_calls")
    if isinstance(calls, list) and calls and isinstance(calls[-1], dict):
        changed["tool_calls"] = [*calls[:-1], _marked_call(calls[-1], call)]
    return changed


def _marked_call(call: dict[str, Any], mark: str) -> dict[str, Any]:
    inner = call.get("function")
    if isinstance(inner, dict):
        return {**call, "function": _marked_call(inner, mark)}
    name = call.get("name")
    return {**call, "name": name + mark} if isinstance(name, str) else call


def _put(content: str, mark: str, outer: bool, *, first: bool) -> str:
    if first:
        at = 0 if outer else len(content) - len(content.lstrip())
    else:
        at = len(content) if outer else len(content.rstrip())
    return content[:at] + mark + content[at:]


def _positions(rendered: str, pattern: re.Pattern[str]) -> Iterator[tuple[str, int]]:
    """Each mark that is there once, and its place in the text without marks."""
    for number, found in enumerate(pattern.finditer(rendered)):
        if rendered.count(found.group()) == 1:
            yield found.group(), found.start() - number


def _spare_characters(text: str, count: int) -> list[str]:
    """Private-use characters that are not in the text."""
    used = set(text) if max(text, default="") >= "\U000f0000" else set()
    spare = (chr(code) for code in range(0xF0000, 0x10FFFE) if chr(code) not in used)
    return [next(spare) for _ in range(count)]


def _common_suffix(one: str, other: str) -> str:
    return os.path.commonprefix([one[::-1], other[::-1]])[::-1]


def _reasons(message: Message) -> bool:
    return any(message.get(key) for key in REASONING)


def _texts(message: Message) -> list[str]:
    """The content's texts that hold more than spaces."""
    content = message.get("content")
    if isinstance(content, str):
        return [content] if content.strip() else []
    return [part["text"] for part in content or () if part["text"].strip()]
