"""The check of found spans against what every message says: whatever led to a wrong one, it is refused."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megakd.data.chat_marks import ASSISTANT, MarkedConversation, texts_of
from megakd.data.chat_template import Conversation

if TYPE_CHECKING:
    from megakd.data.assistant_spans import Span

NOT_FOUND = "assistant's turn not found"
REMEDY = "Use a template with {% generation %} (--chat-template FILE)"
_SHOWN = 30


def check_spans(conversation: Conversation, marked: MarkedConversation, spans: Sequence[Span]) -> str | None:
    """What is wrong with spans, or None.

    They are in order and apart; no text of another role lies in one; what a message of the assistant says lies in its
    own, all of it, or, where the template says itself what is learned, in none.
    """
    text, template = marked.here.text, conversation.template
    for one, other in zip(spans, spans[1:], strict=False):
        if other.start < one.end:
            return f"the turns of messages {one.message} and {other.message} overlap{_at(text, other.start)}"
    for place in marked.here.places:
        number, position = place.mark.message, place.position
        role = conversation.messages[number]["role"]
        # Spans are in order, so it is the last that begins before the place, or the one before where both touch it.
        last = bisect_right(spans, position, key=lambda span: span.start)
        near = spans[max(0, last - 2) : last]
        if role != ASSISTANT:
            if any(span.start < position < span.end for span in near):
                return f"the text of message {number} ({role}) lies inside a turn of the assistant{_at(text, position)}"
            continue
        holders = [span for span in near if position <= span.end]
        if not any(span.message == number for span in holders) and (holders or not template.has_blocks):
            return f"a text of message {number} lies outside its turn{_at(text, position)}"
    return _unmarked_inside(conversation, marked, spans) or _calls(conversation, marked, spans)


def excerpt(text: str, position: int) -> str:
    """The text around a position, which ⟨here⟩ shows."""
    before, behind = text[max(0, position - _SHOWN) : position], text[position : position + _SHOWN]
    return repr(f"{before}⟨here⟩{behind}")


def _at(text: str, position: int) -> str:
    return f" (at {excerpt(text, position)})"


def _unmarked_inside(conversation: Conversation, marked: MarkedConversation, spans: Sequence[Span]) -> str | None:
    """Texts of others that could not be marked are looked for by themselves."""
    for number, message in enumerate(conversation.messages):
        if number in marked.known or message["role"] == ASSISTANT:
            continue
        for said in map(str.strip, texts_of(message)):
            for span in spans:
                inside = marked.here.text[span.start : span.end]
                if said in inside and not any(said in own for own in _said(conversation, span)):
                    at = span.start + inside.index(said)
                    what = f"the text of message {number} ({message['role']}) may lie inside a turn of the assistant"
                    return f"{what}{_at(marked.here.text, at)}"
    return None


def _said(conversation: Conversation, span: Span) -> list[str]:
    return [str(conversation.messages[span.message])] if span.message is not None else []


def _calls(conversation: Conversation, marked: MarkedConversation, spans: Sequence[Span]) -> str | None:
    """Each call is in the text, and in one turn with what is said beside it."""
    text, eos = marked.here.text, conversation.template.eos_token
    for number in marked.known:
        calls = conversation.messages[number].get("tool_calls")
        places = marked.here.of(number)
        if not isinstance(calls, list) or not calls or conversation.messages[number]["role"] != ASSISTANT:
            continue
        names = marked.call_names(number)
        missing = [name for name, character in names if marked.here.find(character) is None]
        if missing:
            shown = _at(text, places[-1].position) if places else ""
            return (
                f"the call of {missing[0]!r} in message {number} is not in the text{shown}: the chat template writes "
                "no calls, or not all of them. Use one for tools, or leave the calls out"
            )
        if eos and eos in str(conversation.messages[number]):
            continue
        for one, other in zip(places, places[1:], strict=False):
            between = text[one.position : other.position]
            if eos and one.mark.kind == "call" and eos in between:
                at = one.position + between.index(eos)
                what = f"the chat template writes message {number} as two turns{_at(text, at)}"
                return f"{what}; where a call has no content, null may help in place of an empty text"
    return None
