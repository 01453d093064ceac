"""Text as units, special tokens and marks whole: what ends a turn is compared by them and never cut through."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice, takewhile

# What templates write like a special token, also where the tokenizer has no such token.
_MARK = r"<{1,3}[|｜/]{0,2}[A-Za-z_][^<>\s]{0,60}>{1,3}|\[/?[A-Z][A-Z_]*\]|\[\|[^\s\[\]|]{1,60}\|\]"
_HEADER_UNITS = 64
_NEAR = 200  # characters before a message's text, in which the mark nearest to it is looked for


class Units:
    """Cuts text into special tokens, what is written like one, words, and single other characters.

    Args:
        special_tokens: the tokenizer's, longest first.
    """

    def __init__(self, special_tokens: Sequence[str]) -> None:
        marks = "|".join([*map(re.escape, special_tokens), _MARK])
        self._mark = re.compile(marks)
        self._units = re.compile(rf"{marks}|\s|\w+|.", re.DOTALL)

    def of(self, text: str) -> list[str]:
        """The text in units."""
        return self._units.findall(text)

    def first(self, text: str, count: int) -> list[str]:
        """The first units of a text."""
        return [found.group() for found in islice(self._units.finditer(text), count)]

    def is_mark(self, unit: str) -> bool:
        """Whether a unit is a special token, or written like one."""
        return self._mark.fullmatch(unit) is not None

    def has_mark(self, text: str) -> bool:
        """Whether a mark is in the text."""
        return self._mark.search(text) is not None

    def is_mark_or_space(self, unit: str) -> bool:
        """Whether a unit is a mark or a space."""
        return unit.isspace() or self.is_mark(unit)

    def common(self, texts: Sequence[str]) -> list[str]:
        """The units that all texts begin with."""
        same = takewhile(lambda units: len(set(units)) == 1, zip(*map(self.of, texts), strict=False))
        return [units[0] for units in same]


@lru_cache(maxsize=8)
def units_of(special_tokens: tuple[str, ...]) -> Units:
    """The units of a tokenizer."""
    return Units(special_tokens)


class TurnEnds:
    """What ends the turns of one conversation.

    Args:
        heads: what stands right before each message's text; the first is all of the text up to there.
        eos: the end-of-text token, which may stand behind the end of the last turn; "" where there is none.
        bos: the token that a text may begin with.
        openers: marks that are known to begin messages.
        end_of_questions: gives what ends a turn of the user, "" where that cannot be told.
    """

    def __init__(
        self,
        units: Units,
        heads: Sequence[str],
        *,
        eos: str,
        bos: str,
        openers: frozenset[str],
        end_of_questions: Callable[[], str],
    ) -> None:
        self._units = units
        self._eos = eos
        self._end_of_questions = end_of_questions
        self._ends: frozenset[str] | None = None
        head = heads[0] if heads else ""
        leading = units.first(head, _HEADER_UNITS)
        while leading and (leading[0].isspace() or (leading[0] in (bos, eos) and len(leading) > 1)):
            leading = leading[1:]
        self._header = leading
        # The first unit of every header, where that is a mark.
        self._begins = set(filter(units.is_mark, leading[:1]))
        self.openers = (openers | self._begins | frozenset(self._nearest(heads))) - {eos}

    def _nearest(self, heads: Sequence[str]) -> Iterator[str]:
        """Marks right before a message's text, which are of its header, as <|user|> is."""
        for number, head in enumerate(heads):
            units = self._units.of(head[-_NEAR:].rstrip())
            marks = [unit for unit in units if self._units.is_mark(unit)]
            # A single one between two texts may end the first.
            if marks and units[-1] == marks[-1] and (number == 0 or len(marks) > 1):
                yield marks[-1]

    def end(self, tail: str, alone: str | None, followed: Sequence[str], *, is_last: bool) -> str:
        """What belongs to a turn of the text behind an answer.

        Args:
            tail: that text, up to the next message's.
            alone: as it is where the message is the last one; None where the template refuses that.
            followed: as it is with other messages behind it.
            is_last: `tail` is `alone`.
        """
        if alone is not None and alone.strip():
            end = self._up_to_end(self._without_header(self._units.common([tail, alone, *followed])))
        else:
            # Nothing but marks tells an end from the header of what follows.
            end = self._marks(self._units.common([tail, *followed]))
        return end + self._end_of_text(tail[len(end) :], bool(end)) if is_last else end

    def call_end(
        self, tail: str, of_answers: str, alone: str | None, asked: str | None, answered: str | None, *, is_last: bool
    ) -> str | None:
        """What belongs to a turn that ends in calls, whose rest is in the tail; None where it cannot be told.

        Args:
            tail: as in `end`.
            alone, is_last: as in `end`.
            of_answers: what ends the turns without calls, or "".
            asked, answered: as the tail is with a message of the user, and with the calls' results, behind it.
        """
        as_answers = tail[: tail.index(of_answers) + len(of_answers)] if of_answers and of_answers in tail else None
        if is_last and as_answers is not None and not tail[len(as_answers) :].strip() and not self._has_header(tail):
            return as_answers
        found = []
        for other in [text for text in (None if is_last else alone, asked, answered) if text is not None]:
            units = self._units.common([tail, other])
            if as_answers is not None and "".join(units).startswith(as_answers):
                # Behind results of calls it might be the end of those.
                if other is not answered or not self._has_header(as_answers):
                    return as_answers
            kept = self._without_header(units)
            common = "".join(kept).rstrip()
            # Up to a header; else with results behind it the header of those would be taken for the end.
            ends = len(kept) < len(units) or (other is not answered and self._ends_in_mark(common))
            if common and (ends or (other is alone and common == other.rstrip())):
                found.append(common)
        if is_last and not found and not self._has_header(tail):
            return tail.rstrip()
        # A header that nobody asked for is common to some.
        end = min(found, key=len, default=None)
        return end + self._end_of_text(tail[len(end) :], True) if is_last and end is not None else end

    def before_header(self, tail: str, others: Sequence[str]) -> str:
        """What all texts begin with, without the beginning of a header."""
        return "".join(self._without_header(self._units.common([tail, *others]))).rstrip()

    def header_at(self, text: str) -> int | None:
        """Where a header begins in the text; None where none is told."""
        units = self._units.of(text)
        begins = [number for number, unit in enumerate(units) if unit in self._begins]
        return len("".join(units[: begins[0]])) if begins else None

    def _ends_in_mark(self, text: str) -> bool:
        last = self._units.of(text)[-1:]
        return bool(last) and self._units.is_mark(last[0]) and last[0] not in self.openers

    def _without_header(self, units: list[str]) -> list[str]:
        """Without the beginning of a header that all texts have next."""
        header = self._header
        for count in range(min(len(units), len(header)), 0, -1):
            if units[-count:] == header[:count]:
                return units[:-count]
        return units

    def _has_header(self, text: str) -> bool:
        return any(unit in self.openers for unit in self._units.of(text))

    def ends_a_turn(self, text: str) -> bool:
        """Whether the text ends in what ends a question, or texts."""
        return not self._ends_of_turns().isdisjoint(self._units.of(text.rstrip())[-1:])

    def _ends_of_turns(self) -> frozenset[str]:
        if self._ends is None:
            marks = [unit for unit in self._units.of(self._end_of_questions()) if self._units.is_mark(unit)]
            self._ends = frozenset({self._eos, *marks[-1:]} - {""})
        return self._ends

    def _up_to_end(self, units: list[str]) -> str:
        """Up to the last mark with what is glued to it; where words stand between marks, to the one that ends turns."""
        first = next((unit for unit in units if not unit.isspace()), "")
        marks = [number for number, unit in enumerate(units) if self._units.is_mark(unit)]
        if first in self.openers or not marks:
            return "" if first in self.openers else "".join(units).rstrip()
        stop = marks[-1] + 1
        if not all(map(self._units.is_mark_or_space, units[marks[0] :])):
            # What stands behind the end of every turn, such as the time, is not the assistant's.
            ends = self._ends_of_turns()
            stop = next((number + 1 for number in marks if units[number] in ends), stop)
        glued = takewhile(
            lambda unit: not (unit.isspace() or unit.isalnum() or self._units.is_mark(unit)), units[stop:]
        )
        stop += len(list(glued))
        return "".join(units[:stop]).rstrip()

    def _marks(self, units: list[str]) -> str:
        """The marks that the units begin with, up to one that begins a message."""
        first = takewhile(lambda unit: self._units.is_mark_or_space(unit) and unit not in self.openers, units)
        return "".join(first).rstrip()

    def _end_of_text(self, rest: str, is_ended: bool) -> str:
        """What ends the text behind the last turn: the end-of-text token, or marks where it has no other end."""
        units = self._units.of(rest.strip())
        if units == [self._eos] or (not is_ended and all(map(self._units.is_mark_or_space, units))):
            return rest.rstrip() if not self.openers.intersection(units) else ""
        return ""
