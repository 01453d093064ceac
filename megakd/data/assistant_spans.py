"""Which characters of a rendered conversation the assistant wrote, found without knowing the template.

Every text of every message is marked (chat_marks), so that it is known where each of them stands. What the template
writes around them is told apart by rendering the conversation as it would be at another moment: up to a message with
the header that asks for it, up to a message that is the last, and with another message behind it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from megakd.data.chat_marks import ASSISTANT, Marked, MarkedConversation, texts_of
from megakd.data.chat_template import REASONING, Conversation, Message, RecordError
from megakd.data.chat_units import TurnEnds, units_of
from megakd.data.span_checks import check_spans, excerpt

NOT_FOUND = "assistant's turn not found"
REMEDY = "Use a template with {% generation %} (--chat-template FILE)"


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
        spans = _Finder(conversation, marked).spans()
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


class _Finder:
    def __init__(self, conversation: Conversation, marked: MarkedConversation) -> None:
        self._conversation = conversation
        self._marked = marked
        self._messages = conversation.messages
        self._text = marked.here.text
        template = conversation.template
        self._units = units_of(template.special_tokens)
        self._turn_ends = TurnEnds(
            self._units,
            list(marked.here.heads()),
            eos=template.eos_token,
            bos=template.bos_token,
            end_of_questions=self._end_of_questions,
        )
        # Headers and ends by the text around them: a long conversation has few that differ.
        self._headers: dict[str, int] = {}
        self._ends: dict[tuple[str, bool], str] = {}
        self._answers_end: str | None = None
        self._header: str | None = None

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
            spans.append(Span(start, max(start, self._end(number, own, start)), number))
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
            at = self._turn_ends.header_at(between) if one.mark.kind != "start" else None
            if at is None or not self._turn_ends.ends_a_turn(between[:at]) or between[at:].split()[0][:8] in said:
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
        end = self._turn_ends.header_at(self._text[begin:differ])
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

    def _end(self, number: int, own: Sequence[int], start: int) -> int:
        said = max(own, default=start)
        if number in self._marked.inner:
            # Marks stand inside the outer spaces, of which the template may keep some.
            content = (texts_of(self._messages[number]) or [""])[-1]
            spaces = content[len(content.rstrip()) :]
            said += len(os.path.commonprefix([spaces, self._text[said : said + len(spaces)]]))
        tail = self._marked.here.tail(number)
        key = (tail or "", number == len(self._messages) - 1)
        if tail is None:
            return max(said, start + len(self._end_behind(number, start)))
        if key not in self._ends:
            self._ends[key] = self._end_in(number, tail)
        last = self._marked.here.of(number)[-1].position
        return max(said, last + len(self._ends[key]))

    def _end_in(self, number: int, tail: str) -> str:
        """What ends the turn, of the text behind the message's last mark."""
        here = self._marked.messages[: number + 1]
        is_last = number == len(self._messages) - 1
        alone = self._marked.here if is_last else self._marked.render(here)
        others = [self._marked.render([*here, *more]) for more in self._followers(number)]
        tails = [None if found is None else found.tail(number) for found in others]
        return self._choose_end(number, tail, None if alone is None else alone.tail(number), tails)

    def _end_behind(self, number: int, start: int) -> str:
        """What ends the turn of a message without marks, which begins at `start`."""
        here = list(self._messages[: number + 1])
        is_last = number == len(self._messages) - 1
        alone = self._text if is_last else self._conversation.try_render(here)
        others = [self._conversation.try_render([*here, *more]) for more in self._followers(number)]
        texts = [
            one[start:] if one is not None and one[:start] == self._text[:start] else None for one in (alone, *others)
        ]
        if not any(text is not None for text in texts):
            raise self._no_end(number, start)
        return self._choose_end(number, self._text[start:], texts[0], texts[1:])

    def _choose_end(self, number: int, tail: str, alone: str | None, followed: list[str | None]) -> str:
        """See TurnEnds; `followed` is in the order of `_followers`."""
        places = self._marked.here.of(number)
        is_last = number == len(self._messages) - 1
        if not places or places[-1].mark.kind != "call":
            others = [text for text in followed if text is not None]
            return self._turn_ends.end(tail, alone, others, is_last=is_last)
        asked, answered = followed
        found = self._turn_ends.call_end(tail, self._end_of_answers(), alone, asked, answered, is_last=is_last)
        if found is None:
            raise self._no_end(number, places[-1].position)
        return found

    def _end_of_answers(self) -> str:
        """What the template writes behind an answer without calls; "" where it is no mark, or cannot be known."""
        if self._answers_end is None:
            asked, answered = (self._marked.new_mark() for _ in range(2))
            asks: Message = {"role": "user", "content": f"{asked}And then?"}
            answers: Message = {"role": ASSISTANT, "content": f"That.{answered}"}
            texts = [self._conversation.try_render([asks, answers, *more]) for more in ([], [asks])]
            tails = [None if one is None else one.partition(answered)[2].split(asked)[0] for one in texts]
            alone, followed = tails
            if followed is None:
                end = "" if alone is None else self._turn_ends.end(alone, alone, [], is_last=False)
            else:
                end = self._turn_ends.end(followed, alone, [], is_last=False)
            self._answers_end = end.strip() if self._units.has_mark(end) else ""
        return self._answers_end

    def _end_of_questions(self) -> str:
        """What the template writes behind a question, whatever follows."""
        marks = [self._marked.new_mark() for _ in range(2)]
        asks: list[Message] = [{"role": "user", "content": f"And then?{mark}"} for mark in marks]
        texts = [self._conversation.try_render(messages) for messages in (asks[:1], asks)]
        tails = [one.partition(marks[0])[2].split("And then?")[0] for one in texts if one is not None]
        return self._turn_ends.before_header(tails[-1], tails[:1]) if len(tails) == 2 else ""

    def _no_end(self, number: int, position: int) -> RecordError:
        return RecordError(
            NOT_FOUND,
            f"the end of message {number} cannot be told: the chat template writes it differently when it is the last"
            f"{self._shown(position)}. {REMEDY}",
        )

    def _followers(self, number: int) -> list[list[Message]]:
        """Messages that may come behind a message, marked: the user's, and results of its calls."""
        mark = self._marked.new_mark()
        asks: list[Message] = [{"role": "user", "content": f"{mark}And then?"}]
        calls = self._messages[number].get("tool_calls")
        if not isinstance(calls, list) or not calls:
            return [asks]
        return [asks, [_result(call, f"{mark}done") for call in calls]]

    def _remedy(self, number: int) -> str:
        if isinstance(self._messages[number].get("content"), str) and self._conversation.template.takes_parts:
            return f'Write its content as [{{"type": "text", "text": ...}}], or use {REMEDY[4:]}'
        return REMEDY

    def _shown(self, position: int) -> str:
        return f" (at {excerpt(self._text, position)})"


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _result(call: Any, content: str) -> Message:
    inner = call.get("function", call) if isinstance(call, dict) else {}
    name = inner.get("name") if isinstance(inner, dict) else None
    found = {"tool_call_id": call.get("id") if isinstance(call, dict) else None, "name": name}
    return {"role": "tool", "content": content, **{key: value for key, value in found.items() if value is not None}}
