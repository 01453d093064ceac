"""Which characters of a rendered conversation the assistant wrote, found without knowing the template.

Every text of every message is marked (chat_marks), so that it is known where each of them stands. What the template
writes around them is found by rendering the conversation as it would be at another moment: up to a message with
the header that asks for it, up to a message that is the last, and with another message behind it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple

from megakd.data.chat_marks import ASSISTANT, Marked, MarkedConversation, texts_of
from megakd.data.chat_template import REASONING, ChatTemplate, Conversation, Message, RecordError
from megakd.data.chat_units import units_of
from megakd.data.span_checks import NOT_FOUND, REMEDY, check_spans, excerpt
from megakd.data.span_ends import SpanEnds


class Span(NamedTuple):
    """The characters [start, end) that the assistant wrote in one message; `message` is None where it is not known."""

    start: int
    end: int
    message: int | None


def find_assistant_spans(conversation: Conversation) -> tuple[str, list[Span]]:
    """Return the conversation's text and the assistant's spans in it, in order.

    A span is all that follows the header which the template writes for a model to go on from, up to and with the token
    that ends the turn. A message of which the template writes nothing has none.

    Raises:
        RecordError: a span cannot be told, or one would hold what the assistant did not write.
    """
    text = conversation.render()
    marked = MarkedConversation(conversation, text)
    if conversation.template.has_blocks:
        spans = _spans_of_blocks(conversation, marked, text)
    else:
        spans = _Finder(conversation, marked, _known(conversation)).spans()
    problem = check_spans(conversation, marked, spans)
    if problem is not None:
        raise RecordError(NOT_FOUND, f"{problem}. {REMEDY}")
    return text, spans


def _spans_of_blocks(conversation: Conversation, marked: MarkedConversation, text: str) -> list[Span]:
    template = conversation.template
    tracked, blocks = template.render_blocks(conversation.messages, conversation.tools, conversation.arguments)
    if tracked != text:
        raise RecordError(NOT_FOUND, "the chat template writes another text when it is asked for its generation blocks")
    own = {n for n, message in enumerate(conversation.messages) if message["role"] == ASSISTANT}
    spans: list[Span] = []
    owner: int | None = None
    for start, end in reversed(blocks):
        inside = {place.mark.message for place in marked.here.places if start <= place.position <= end} & own
        # A block without a text of its own, such as an empty thought, is of the message whose text comes next.
        owner = min(inside) if inside else owner
        spans.append(Span(start, end, owner))
    spans.reverse()
    # Behind the last text, such as an end of its own, it is of the message before.
    known = max((span.message for span in spans if span.message is not None), default=None)
    return [span if span.message is not None else span._replace(message=known) for span in spans]


class _Known(NamedTuple):
    """What is known of a template.

    Attributes:
        headers: lengths by the text between two messages.
        ends: by the text behind a message, and whether that is the last one.
        openers: marks that begin messages.
    """

    headers: dict[str, int]
    ends: dict[tuple[str, bool], str]
    openers: frozenset[str]


def _known(conversation: Conversation) -> _Known:
    """What a short conversation shows of the template, whose text longer ones share, tools and documents aside."""
    # What differs from record to record, as documents do, would be looked at again for each.
    simple = {name: value for name, value in conversation.arguments.items() if not isinstance(value, list | dict)}
    known = _known_of(conversation.template, json.dumps(simple, sort_keys=True, default=str))
    is_whole = conversation.tools is None and len(simple) == len(conversation.arguments)
    return known if is_whole else _Known({}, {}, known.openers)


@lru_cache(maxsize=64)
def _known_of(template: ChatTemplate, arguments: str) -> _Known:
    said = (("system", "Help."), ("user", "What?"), (ASSISTANT, "This."), ("user", "And then?"), (ASSISTANT, "That."))
    messages: list[Message] = [{"role": role, "content": content} for role, content in said]
    known = _Known({}, {}, frozenset())
    found: list[tuple[Conversation, MarkedConversation]] = []
    # A system message shows its header where the template has a place for one, and a question that is first its own.
    for some in (messages, messages[1:]):
        conversation = Conversation(template, some, None, json.loads(arguments))
        text = conversation.try_render(some)
        if text is not None:
            found.append((conversation, MarkedConversation(conversation, text)))
            openers = _Finder(*found[-1], known).known.openers
            known = _Known({}, {}, known.openers | openers)
    if not found:
        return known
    finder = _Finder(*found[-1], known)
    with suppress(RecordError):
        finder.spans()
    return finder.known


class _Finder:
    def __init__(self, conversation: Conversation, marked: MarkedConversation, known: _Known) -> None:
        self._conversation = conversation
        self._marked = marked
        self._messages = conversation.messages
        self._text = marked.here.text
        template = conversation.template
        self._units = units_of(template.special_tokens)
        # Headers and ends by the text around them: a long conversation has few that differ, and most have those of any.
        self._headers = dict(known.headers)
        self._ends = SpanEnds(conversation, marked, self._units, known.ends, known.openers)
        self._header: str | None = None

    @property
    def known(self) -> _Known:
        """What has been found so far."""
        return _Known(self._headers, self._ends.known, self._ends.turn_ends.openers)

    def spans(self) -> list[Span]:
        spans: list[Span] = []
        for number, message in enumerate(self._messages):
            if message["role"] != ASSISTANT:
                continue
            after = spans[-1].end if spans else 0
            own = self._own(number, after)
            if own is None:
                continue
            start = self._start(number, own, after)
            spans.append(Span(start, max(start, self._ends.end(number, own, start)), number))
            self._refuse_turns_within(number)
        return spans

    def _own(self, number: int, after: int) -> list[int] | None:
        """Positions of what the message says, in order; None where the template writes nothing of it."""
        found = [place.position for place in self._marked.here.of(number)]
        if found:
            return found
        content = self._content_by_neighbours(number)
        if content is not None:
            return content
        if texts_of(self._messages[number]) or self._messages[number].get("tool_calls"):
            raise RecordError(
                NOT_FOUND,
                f"the start of message {number} cannot be told: what it says is not in the text as it stands there"
                f"{self._shown(after)}. {self._remedy(number)}",
            )
        shorter = [self._conversation.try_render(self._messages[: number + more]) for more in (0, 1)]
        return None if shorter[0] is not None and shorter[0] == shorter[1] else []

    def _content_by_neighbours(self, number: int) -> list[int] | None:
        """Where a content stands that cannot be marked: between what is around another content in its place."""
        mark = self._marked.new_mark()
        messages = list(self._messages)
        messages[number] = {**messages[number], "content": mark}
        rendered = self._conversation.try_render(messages)
        if rendered is None or rendered.count(mark) != 1:
            return None
        before, behind = rendered.split(mark)
        fits = len(before) + len(behind) <= len(self._text)
        if not (fits and self._text.startswith(before) and self._text.endswith(behind)):
            return None
        place = slice(len(before), len(self._text) - len(behind))
        # A template that changes a content's words is not understood.
        if _squeezed(self._text[place]) not in _squeezed(" ".join(texts_of(self._messages[number]))):
            return None
        return [place.start, place.stop]

    def _start(self, number: int, own: Sequence[int], after: int) -> int:
        bound = min(own, default=len(self._text))
        before = next(self._marked.here.before(bound - 1), None)
        gap = self._text[before.position : bound] if before is not None and own else None
        if gap is not None and gap in self._headers:
            return bound - len(gap) + self._headers[gap]
        start = self._prompted(number, after, bound) if number else self._first(bound)
        if start is None:
            start = self._unprompted(number, own, after, bound)
        if gap is not None and bound - len(gap) <= start:
            self._headers[gap] = start - (bound - len(gap))
        return start

    def _first(self, bound: int) -> int | None:
        """Where the header of a conversation's first message ends: the one that is written behind a question."""
        header = self._asked_header()
        place = self._text.rfind(header, 0, bound) if header else -1
        return place + len(header) if place >= 0 else None

    def _asked_header(self) -> str:
        """What the template writes behind a question when it is asked for the answer; "" where that cannot be told."""
        if self._header is None:
            asks: list[Message] = [{"role": "user", "content": "And then?"}]
            asked, unasked = (self._conversation.try_render(asks, prompt=prompt) for prompt in (True, False))
            is_behind = asked is not None and unasked is not None and asked.startswith(unasked)
            header = asked[len(unasked) :] if is_behind and asked is not None and unasked is not None else ""
            self._header = header if header.strip() else ""
        return self._header

    def _refuse_turns_within(self, number: int) -> None:
        """Raise RecordError where the template writes a message with a header within, which is not the answer's own."""
        places, said = self._marked.here.of(number), str(self._messages[number])
        for one, other in zip(places, places[1:], strict=False):
            between = self._text[one.position : other.position]
            at = self._ends.turn_ends.header_at(between) if one.mark.kind != "start" else None
            if at is None or not self._ends.turn_ends.ends_a_turn(between[:at]) or between[at:].split()[0][:8] in said:
                continue
            if not between[at:].startswith(self._asked_header().strip() or between[at:]):
                raise RecordError(
                    NOT_FOUND,
                    f"the chat template writes message {number} as turns of several kinds"
                    f"{self._shown(one.position + at)}. {REMEDY}",
                )

    def _prompted(self, number: int, after: int, bound: int) -> int | None:
        """Where the header ends that the template writes for an answer; None where the text has another."""
        earlier = self._marked.messages[:number]
        asked = self._marked.render(earlier, prompt=True)
        start = None if asked is None else self._locate(asked, len(asked.text))
        if asked is None or start is None or not after <= start <= bound:
            return None
        if self._conversation.template.has_prompt:
            if not self._text[start:bound].strip():
                return start
            unasked = self._marked.render(earlier)
            if unasked is not None and unasked.text != asked.text:
                return start
        return start if self._writes_headers_unasked(number, asked) else None

    def _writes_headers_unasked(self, number: int, ended: Marked) -> bool:
        """Whether the text up to a message ends in more than what ends the message before it."""
        asks: Message = {"role": "user", "content": f"{self._marked.new_mark()}And then?"}
        followed = self._marked.render([*self._marked.messages[:number], asks])
        tails = [None if found is None else found.tail(number - 1) for found in (ended, followed)]
        if tails[0] is None or tails[1] is None:
            return False
        common = "".join(self._units.common([tails[0], tails[1]]))
        return bool(tails[0][len(common) :].strip())

    def _where_they_differ(self, number: int, after: int, bound: int) -> int | None:
        """Where the text goes on otherwise than the header which the template writes for an answer."""
        earlier = self._marked.messages[:number]
        asked, unasked = (self._marked.render(earlier, prompt=prompt) for prompt in (True, False))
        if asked is None or unasked is None:
            return None
        has_header = unasked.text != asked.text or self._writes_headers_unasked(number, asked)
        here, there = self._anchor(asked, len(asked.text))
        common = "".join(self._units.common([asked.text[there:], self._text[here:bound]]))
        differ = here + len(common)
        other = self._units.first(asked.text[there + len(common) :], 1)
        if other and other[0].isalnum():
            return None  # within the header: a turn of another kind
        # Behind what ends the message before, of which the header's beginning is told from the text without it.
        begin = self._anchor(unasked, len(unasked.text))[0]
        end = self._ends.turn_ends.header_at(self._text[begin:differ])
        return differ if has_header and max(after, begin + (end or 0)) < differ <= bound else None

    def _unprompted(self, number: int, own: Sequence[int], after: int, bound: int) -> int:
        """Where a turn begins whose header the template does not write when asked, or writes otherwise."""
        places = self._marked.here.of(number)
        # Of a message that is marked, thoughts that stand before the content would be the first.
        reasons = number not in self._marked.known and any(self._messages[number].get(key) for key in REASONING)
        answers = not places or places[0].mark.kind == "start"
        if own and answers and not reasons:
            differ = self._where_they_differ(number, after, bound)
            between = "" if differ is None else self._text[differ:bound]
            if all(map(self._units.is_mark_or_space, self._units.of(between))):
                return max(after, bound - self._unprompted_spaces(number, bound))
        found = self._header_of_another(number, after, bound)
        if found is None:
            found = self._where_they_differ(number, after, bound)
        if found is None:
            raise RecordError(
                NOT_FOUND,
                f"the start of message {number} cannot be told: the chat template changes its content and writes no "
                f"header that is in the text{self._shown(bound)}. {REMEDY}",
            )
        return found

    def _unprompted_spaces(self, number: int, content: int) -> int:
        """How many spaces before the content a template without generation prompts leaves to the model.

        They are no header: given the conversation up to here, which ends in the same word, the model has to write them.
        """
        if self._conversation.template.has_prompt:
            return 0
        word = self._text[:content].rstrip()
        spaces = self._text[len(word) : content]
        before = self._conversation.try_render(self._messages[:number]) if spaces else None
        if before is None or before.split()[-1:] != word[-len(before) :].split()[-1:]:
            return 0
        written = before[len(before.rstrip()) :]
        return len(spaces) - len(written) if spaces.startswith(written) else 0

    def _header_of_another(self, number: int, after: int, bound: int) -> int | None:
        """Where the header ends that the template writes before another content in this place, if the text has it."""
        earlier, behind = self._marked.messages[:number], self._messages[number + 1 :]
        # A header that changes with the content is none.
        mark = self._marked.new_mark()
        # Tools may stand before the last question, and so elsewhere in a conversation that ends here.
        for rest in (behind, ()):
            headers = []
            for more in ("", " and other words\n"):
                other = {"role": ASSISTANT, "content": mark + more}
                rendered = self._marked.render([*earlier, other, *rest])
                end = None if rendered is None else rendered.find(mark)
                headers.append(None if rendered is None or end is None else (rendered, end))
            first, second = headers
            if first is None or second is None or first[0].text[: first[1]] != second[0].text[: second[1]]:
                continue
            rendered, end = first
            for length in (end, len(rendered.text[:end].rstrip())):
                found = self._locate(rendered, length)
                if found is not None and after <= found <= bound:
                    return found
        return None

    def _anchor(self, other: Marked, position: int) -> tuple[int, int]:
        """The position of the last common mark up to `position`, in the text and in another rendering."""
        for place in other.before(position):
            here = self._marked.here.find(place.character)
            if here is not None:
                return here, place.position
        return 0, 0

    def _locate(self, other: Marked, position: int) -> int | None:
        """The position in the text that has the same before it as in another rendering, since the last common mark."""
        here, there = self._anchor(other, position)
        return here + position - there if self._text.startswith(other.text[there:position], here) else None

    def _remedy(self, number: int) -> str:
        if isinstance(self._messages[number].get("content"), str) and self._conversation.template.takes_parts:
            return f'Write its content as [{{"type": "text", "text": ...}}], or use {REMEDY[4:]}'
        return REMEDY

    def _shown(self, position: int) -> str:
        return f" (at {excerpt(self._text, position)})"


def _squeezed(text: str) -> str:
    return "".join(text.split())
