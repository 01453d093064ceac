"""Marks: spare characters put into the texts of messages, which tell where a chat template writes each of them."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from megakd.data.chat_template import REASONING, Conversation, Message

ASSISTANT = "assistant"
OUTSIDE = -1
# Rare ideographs (extensions G and B): letters to every filter, so that neither a template's `trim` nor Python's repr
# nor `tojson` changes them, as they would a private character or a space of no width.
_SPARE = (range(0x30000, 0x3134B), range(0x20000, 0x2A6DE))
_SPARE_PATTERN = re.compile("[\U00020000-\U0002a6dd\U00030000-\U0003134a]")
# Keys of a message with text that the assistant wrote, beside its content and calls.
_THOUGHTS = (*REASONING, "tool_plan")

Kind = Literal["start", "end", "thought", "call"]


class Mark(NamedTuple):
    """What a mark stands for: the start or the end of a message's content, or a text in its thoughts or its calls."""

    message: int
    kind: Kind


class Place(NamedTuple):
    """A mark's position in a rendered text from which all marks are taken out."""

    position: int
    mark: Mark
    character: str


class Style(NamedTuple):
    """How messages are marked.

    Attributes:
        outer: content is marked outside its outer spaces, which a template that trims would then keep.
        empty: contents without text are marked, which a template that asks whether there is one notices.
        others: messages that the assistant did not write are marked too.
        calls: the texts in calls are marked, beside their names.
    """

    outer: bool = True
    empty: bool = True
    others: bool = True
    calls: bool = True


# From the most that is marked to the least; the first that changes nothing else is taken.
STYLES = (
    Style(),
    Style(empty=False),
    Style(outer=False, empty=False),
    Style(outer=False, empty=False, calls=False),
    Style(empty=False, others=False, calls=False),
    Style(outer=False, empty=False, others=False, calls=False),
)


class Marked:
    """A rendered text without its marks, and where they were, in order."""

    def __init__(self, text: str, places: list[Place]) -> None:
        self.text = text
        self.places = places
        self._of: dict[int, list[int]] = {}
        self._positions: dict[str, int | None] = {}
        for number, place in enumerate(places):
            self._of.setdefault(place.mark.message, []).append(number)
            self._positions[place.character] = None if place.character in self._positions else place.position

    def of(self, message: int) -> list[Place]:
        """Places of one message's marks."""
        return [self.places[number] for number in self._of.get(message, ())]

    def find(self, character: str) -> int | None:
        """The position of a mark that is in the text once."""
        return self._positions.get(character)

    def before(self, position: int) -> Iterator[Place]:
        """Places up to a position, the last one first, of marks that are in the text once."""
        number = bisect_right(self.places, position, key=lambda place: place.position)
        return (place for place in reversed(self.places[:number]) if self.find(place.character) is not None)

    def heads(self) -> Iterator[str]:
        """What stands before each message's content, since the mark before."""
        before, seen = 0, set[int]()
        for place in self.places:
            if place.mark.message not in seen and place.mark.kind == "start":
                yield self.text[before : place.position]
            seen.add(place.mark.message)
            before = place.position

    def tail(self, message: int) -> str | None:
        """The text behind a message's last mark, up to the next one of another message; None without such a mark."""
        own = self._of.get(message)
        if not own:
            return None
        begin, rest = self.places[own[-1]].position, self.places[own[-1] + 1 : own[-1] + 2]
        return self.text[begin : rest[0].position if rest else len(self.text)]


class MarkedConversation:
    """A conversation with marks in it, in the first of the styles that changes nothing in what the template writes.

    Where none does, as many messages are marked as change nothing.
    """

    def __init__(self, conversation: Conversation, text: str) -> None:
        self.conversation = conversation
        self._spare = _spare_characters(text)
        self._marks: dict[str, Mark] = {}
        self.messages: list[Message] = list(conversation.messages)
        self.here = Marked(text, [])
        self.known: set[int] = set()  # messages that are marked
        self.inner: set[int] = set()  # those that are inside their outer spaces
        everyone = range(len(self.messages))
        if not any(self._try(everyone, style) for style in STYLES):
            self._mark_some(everyone)

    def new_mark(self) -> str:
        """A mark of a message that is not of the conversation."""
        return self._new(OUTSIDE, "start")

    def call_names(self, number: int) -> list[tuple[str, str]]:
        """Names of a message's calls with the mark behind each."""
        calls = self.messages[number].get("tool_calls") or []
        names = [call.get("function", call).get("name") for call in calls if isinstance(call, dict)]
        return [(name[:-1], name[-1]) for name in names if isinstance(name, str) and name[-1:] in self._marks]

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> Marked | None:
        """Render other messages, some of them marked; None where the template refuses them."""
        rendered = self.conversation.try_render(messages, prompt=prompt)
        return None if rendered is None else self.unmark(rendered)

    def unmark(self, rendered: str) -> Marked:
        """Take the marks out of a rendered text."""
        parts: list[str] = []
        places: list[Place] = []
        begin = length = 0
        echoes: set[str] = set()
        for one in _SPARE_PATTERN.finditer(rendered):
            character = one.group()
            mark = self._marks.get(character)
            if mark is None:
                continue
            parts.append(rendered[begin : one.start()])
            length += one.start() - begin
            begin = one.end()
            # Templates write the name of a call once more, in front of its result.
            if mark.kind != "call" or character not in echoes:
                places.append(Place(length, mark, character))
            echoes.add(character)
        return Marked("".join([*parts, rendered[begin:]]), places)

    def _try(self, numbers: range, style: Style) -> bool:
        """Mark these messages too, where that changes nothing else in the text."""
        messages = list(self.messages)
        messages[numbers.start : numbers.stop] = [self._marked(n, messages[n], style) for n in numbers]
        found = self.render(messages)
        if found is None or found.text != self.here.text:
            return False
        self.messages, self.here = messages, found
        self.known.update(n for n in numbers if messages[n] is not self.conversation.messages[n])
        if not style.outer:
            self.inner.update(numbers)
        return True

    def _mark_some(self, numbers: range) -> None:
        """Halve until what remains unmarked are messages that cannot be: few renderings where those are few."""
        if len(numbers) == 1:
            any(self._try(numbers, style) for style in STYLES[:4])
            return
        middle = (numbers.start + numbers.stop) // 2
        for half in (range(numbers.start, middle), range(middle, numbers.stop)):
            if not self._try(half, STYLES[2]):
                self._mark_some(half)

    def _marked(self, number: int, message: Message, style: Style) -> Message:
        own = message["role"] == ASSISTANT
        if not own and not style.others:
            return message
        changed = dict(message)
        if "content" in message:
            changed["content"] = self._marked_content(number, message["content"], style)
        if not own:
            return changed
        for key in _THOUGHTS:
            if isinstance(message.get(key), str) and message[key].strip():
                changed[key] = message[key].rstrip() + self._new(number, "thought") + _outer_end(message[key])
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            changed["tool_calls"] = [self._marked_call(number, call, style) for call in calls]
        return changed

    def _marked_content(self, number: int, content: object, style: Style) -> object:
        if isinstance(content, str):
            if not content.strip():
                return content + self._new(number, "start") if style.empty else content
            return self._put(self._put(content, number, "start", style), number, "end", style)
        if isinstance(content, list):
            filled = [place for place, part in enumerate(content) if _text_of(part).strip()]
            if filled:
                parts = [dict(part) if isinstance(part, dict) else part for part in content]
                for place, kind in ((filled[0], "start"), (filled[-1], "end")):
                    parts[place]["text"] = self._put(parts[place]["text"], number, kind, style)  # type: ignore[arg-type]
                return parts
        return content

    def _marked_call(self, number: int, call: Any, style: Style) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return {**call, "function": self._marked_call(number, call["function"], style)}
        changed = dict(call)
        if isinstance(call.get("name"), str):
            changed["name"] = call["name"] + self._new(number, "call")
        if style.calls and "arguments" in call:
            changed["arguments"] = self._marked_texts(number, call["arguments"])
        return changed

    def _marked_texts(self, number: int, value: Any) -> Any:
        if isinstance(value, str):
            return value + self._new(number, "call")
        if isinstance(value, dict):
            return {key: self._marked_texts(number, one) for key, one in value.items()}
        return [self._marked_texts(number, one) for one in value] if isinstance(value, list) else value

    def _put(self, text: str, number: int, kind: Kind, style: Style) -> str:
        if kind == "start":
            at = 0 if style.outer else len(text) - len(text.lstrip())
        else:
            at = len(text) if style.outer else len(text.rstrip())
        return text[:at] + self._new(number, kind) + text[at:]

    def _new(self, number: int, kind: Kind) -> str:
        mark = next(self._spare, "")  # more texts than marks: the rest has none
        self._marks[mark] = Mark(number, kind)
        return mark


def texts_of(message: Message) -> list[str]:
    """The content's texts that hold more than spaces."""
    content = message.get("content")
    parts = [content] if isinstance(content, str) else [_text_of(part) for part in content or ()]
    return [text for text in parts if text.strip()]


def _spare_characters(text: str) -> Iterator[str]:
    used = set(_SPARE_PATTERN.findall(text))
    return (chr(code) for codes in _SPARE for code in codes if chr(code) not in used)


def _text_of(part: object) -> str:
    text = part.get("text") if isinstance(part, dict) else None
    return text if isinstance(text, str) else ""


def _outer_end(text: str) -> str:
    return text[len(text.rstrip()) :]
