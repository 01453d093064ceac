"""An encoder with masks that can be made to fail; worker processes import it from here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megakd.common.errors import UserError
from megakd.data.records import Encoded, Problem, Record
from megakd.data.tokenizer import Tokenizer


class HalfLearned:
    """Every second token of a text is learned; "fail" and "die" do what they say."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, records: Sequence[Record]) -> list[Encoded | Problem]:
        results: list[Encoded | Problem] = []
        for record in records:
            if record["body"] == "fail":
                raise UserError("the template cannot be applied.")
            if record["body"] == "die":
                os._exit(3)
            ids = np.array(self._tokenizer.encode(record["body"]), dtype=np.int64)
            mask = (np.arange(len(ids)) % 2).astype(np.uint8)
            results.append(Problem("odd") if record["body"] == "odd" else Encoded(ids, mask))
        return results


@dataclass(frozen=True)
class HalfLearnedSettings:
    fields: tuple[str, ...] = ("body",)
    masks: bool = True

    def build(self, tokenizer: Tokenizer) -> HalfLearned:
        return HalfLearned(tokenizer)

    def metadata(self) -> dict[str, Any]:
        return {"half": True}
