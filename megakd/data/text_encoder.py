"""The encoder of plain documents: [bos] text eos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megakd.common.errors import UserError
from megakd.data.records import EMPTY, Encoded, Problem, Record, text_problem
from megakd.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextSettings:
    """A document per record: the text under `key`, between bos and eos where they are asked for."""

    key: str = "text"
    append_eod: bool = True
    prepend_bos: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.key,)

    @property
    def masks(self) -> bool:
        return False

    def build(self, tokenizer: Tokenizer) -> TextEncoder:
        head = special_token(tokenizer, "bos", tokenizer.bos_id, "Leave out --prepend-bos.") if self.prepend_bos else []
        tail = special_token(tokenizer, "eos", tokenizer.eos_id, "Use --no-append-eod.") if self.append_eod else []
        return TextEncoder(tokenizer, self.key, head, tail)

    def metadata(self) -> dict[str, Any]:
        return {"appended_eod": self.append_eod, "prepended_bos": self.prepend_bos}


class TextEncoder:
    """Built by `TextSettings.build`."""

    def __init__(self, tokenizer: Tokenizer, key: str, head: list[int], tail: list[int]) -> None:
        self._tokenizer = tokenizer
        self._key = key
        self._head = head
        self._tail = tail

    def encode(self, records: Sequence[Record]) -> list[Encoded | Problem]:
        problems = [text_problem(record[self._key], self._key) for record in records]
        texts = [record[self._key] for record, problem in zip(records, problems, strict=True) if problem is None]
        ids = iter(self._tokenizer.encode_batch(texts))
        return [self._document(next(ids)) if problem is None else problem for problem in problems]

    def _document(self, ids: list[int]) -> Encoded | Problem:
        if not ids:
            return EMPTY
        return Encoded(np.array([*self._head, *ids, *self._tail], dtype=np.int32))


def special_token(tokenizer: Tokenizer, name: str, index: int | None, remedy: str) -> list[int]:
    """The id as a list; raises UserError, with the remedy, where the tokenizer has none."""
    if index is None:
        raise UserError(f"the tokenizer {tokenizer.path} has no {name} token. {remedy}")
    return [index]
