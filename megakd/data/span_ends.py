"""Where the assistant's spans end: behind what the template writes after a message, whatever follows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from megakd.data.chat_marks import ASSISTANT, MarkedConversation, texts_of
from megakd.data.chat_template import Conversation, Message, RecordError
from megakd.data.chat_units import TurnEnds, Units
from megakd.data.span_checks import NOT_FOUND, REMEDY, excerpt


class SpanEnds:
    """Finds ends in one conversation.

    Args:
        known: ends by the text behind a message, and whether that is the last one.
        openers: marks that are known to begin messages.
    """

    def __init__(
        self,
        conversation: Conversation,
        marked: MarkedConversation,
        units: Units,
        known: Mapping[tuple[str, bool], str],
        openers: frozenset[str],
    ) -> None:
        self._conversation, self._marked, self._units = conversation, marked, units
        self._messages = conversation.messages
        self._text = marked.here.text
        self.turn_ends = TurnEnds(
            units,
            list(marked.here.heads()),
            eos=conversation.template.eos_token,
            bos=conversation.template.bos_token,
            openers=openers,
            end_of_questions=self._end_of_questions,
        )
        self.known = dict(known)
        self._answers_end: str | None = None

    def end(self, number: int, own: Sequence[int], start: int) -> int:
        """Return where a message's span ends.

        Args:
            own: positions of what the message says, in order.
            start: where the span begins.

        Raises:
            RecordError: it cannot be told.
        """
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
        if key not in self.known:
            self.known[key] = self._end_in(number, tail)
        last = self._marked.here.of(number)[-1].position
        return max(said, last + len(self.known[key]))

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
            return self.turn_ends.end(tail, alone, others, is_last=is_last)
        asked, answered = followed
        found = self.turn_ends.call_end(tail, self._end_of_answers(), alone, asked, answered, is_last=is_last)
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
                end = "" if alone is None else self.turn_ends.end(alone, alone, [], is_last=False)
            else:
                end = self.turn_ends.end(followed, alone, [], is_last=False)
            self._answers_end = end.strip() if self._units.has_mark(end) else ""
        return self._answers_end

    def _end_of_questions(self) -> str:
        """What the template writes behind a question, whatever follows."""
        marks = [self._marked.new_mark() for _ in range(2)]
        asks: list[Message] = [{"role": "user", "content": f"And then?{mark}"} for mark in marks]
        texts = [self._conversation.try_render(messages) for messages in (asks[:1], asks)]
        tails = [one.partition(marks[0])[2].split("And then?")[0] for one in texts if one is not None]
        return self.turn_ends.before_header(tails[-1], tails[:1]) if len(tails) == 2 else ""

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

    def _shown(self, position: int) -> str:
        return f" (at {excerpt(self._text, position)})"


def _result(call: Any, content: str) -> Message:
    inner = call.get("function", call) if isinstance(call, dict) else {}
    name = inner.get("name") if isinstance(inner, dict) else None
    found = {"tool_call_id": call.get("id") if isinstance(call, dict) else None, "name": name}
    return {"role": "tool", "content": content, **{key: value for key, value in found.items() if value is not None}}
