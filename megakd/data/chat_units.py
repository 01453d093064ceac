"""Text as units, special tokens and marks whole: what ends a turn is compared by them and never cut through."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice, takewhile

# What templates write like a special token, also where the tokenizer has no such token.
_MARK = r"<[|｜/]?[A-Za-z_][^<>\s]{0,60}>|\[/?[A-Z][A-Z_]*\]"
_HEADER_UNITS = 64


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
        head: the conversation's text up to its first message's, with the header of that.
        asks: the text up to the first message of the user.
        eos: the end-of-text token, which may stand behind the end of the last turn; "" where there is none.
        bos: the token that a text may begin with.
    """

    def __init__(self, units: Units, *, head: str, asks: str, eos: str, bos: str) -> None:
        self._units = units
        self._eos = eos
        leading = units.first(head, _HEADER_UNITS)
        while leading and (leading[0].isspace() or (leading[0] in (bos, eos) and len(leading) > 1)):
            leading = leading[1:]
        self._header = leading
        openers = [*takewhile(units.is_mark_or_space, leading), *units.of(asks[-200:].rstrip())[-1:]]
        self._openers = {unit for unit in openers if units.is_mark(unit) and unit != eos}

    def end(self, tail: str, alone: str | None, followed: Sequence[str], *, is_last: bool) -> str:
        """What belongs to a turn of the text behind an answer.

        Args:
            tail: that text, up to the next message's.
            alone: as it is where the message is the last one; None where the template refuses that.
            followed: as it is with other messages behind it.
            is_last: `tail` is `alone`.
        """
        if alone is not None and alone.strip():
            end = self._without_words(self._without_header(self._units.common([tail, alone, *followed])))
        else:
            # Nothing but marks tells an end from the header of what follows.
            end = self._marks(self._units.common([tail, *followed]))
        return end + self._end_of_text(tail[len(end) :], bool(end)) if is_last else end

    def call_end(
        self, tail: str, of_answers: str, alone: str | None, asked: str | None, answered: str | None
    ) -> str | None:
        """What belongs to a turn that ends in calls, whose rest is in the tail; None where it cannot be told.

        Args:
            tail, alone: as in `end`.
            of_answers: what ends the turns without calls, or "".
            asked, answered: as the tail is with a message of the user, and with the calls' results, behind it.
        """
        if of_answers and of_answers in tail:
            return tail[: tail.index(of_answers) + len(of_answers)]
        for other in (alone, asked, answered):
            if other is None:
                continue
            units = self._units.common([tail, other])
            kept = self._without_header(units)
            common = "".join(kept).rstrip()
            # Up to a header; else with results behind it the header of those would be taken for the end.
            ends = len(kept) < len(units) or (other is not answered and self._ends_in_mark(common))
            if common and (ends or (other is alone and common == other.rstrip())):
                return common
        return None

    def header_at(self, text: str) -> int:
        """Where a header begins in the text behind a message; 0 where none is told."""
        units = self._units.of(text)
        begins = [number for number, unit in enumerate(units) if [unit] == self._header[:1]]
        return len("".join(units[: begins[0]])) if begins else 0

    def _ends_in_mark(self, text: str) -> bool:
        last = self._units.of(text)[-1:]
        return bool(last) and self._units.is_mark(last[0]) and last[0] not in self._openers

    def _without_header(self, units: list[str]) -> list[str]:
        """Without the beginning of a header that all texts have next."""
        header = self._header
        for count in range(min(len(units), len(header)), 0, -1):
            if units[-count:] == header[:count]:
                return units[:-count]
        return units

    def _without_words(self, units: list[str]) -> str:
        """Up to the last mark, where there is one."""
        marks = [number for number, unit in enumerate(units) if self._units.is_mark(unit)]
        return "".join(units[: marks[-1] + 1] if marks else units).rstrip()

    def _marks(self, units: list[str]) -> str:
        """The marks that the units begin with, up to one that begins a message."""
        first = takewhile(lambda unit: self._units.is_mark_or_space(unit) and unit not in self._openers, units)
        return "".join(first).rstrip()

    def _end_of_text(self, rest: str, is_ended: bool) -> str:
        """What ends the text behind the last turn: the end-of-text token, or marks where it has no other end."""
        units = self._units.of(rest.strip())
        if units == [self._eos] or (not is_ended and all(map(self._units.is_mark_or_space, units))):
            return rest.rstrip() if not self._openers.intersection(units) else ""
        return ""
