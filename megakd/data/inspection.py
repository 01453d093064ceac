"""Token files shown to a person: documents decoded, with what is learned of them marked."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from numpy.typing import NDArray

from megakd.common.errors import UserError
from megakd.data.fingerprint import metadata_path, read_metadata
from megakd.data.indexed import TokenStream
from megakd.data.records import CONTEXT, EARLIER, RESPONSE
from megakd.data.tokenizer import Tokenizer, load_tokenizer

MARKS = {CONTEXT: ("", ""), EARLIER: ("⟦1:", "⟧"), RESPONSE: ("⟦", "⟧")}
STYLES = {CONTEXT: "", EARLIER: "yellow", RESPONSE: "bold green"}
NAMES = {EARLIER: "in earlier turns", RESPONSE: "in the response"}


def inspect_tokens(
    prefix: str | Path,
    tokenizer_path: str | None = None,
    *,
    start: int = 0,
    samples: int = 3,
    out: TextIO | None = None,
) -> None:
    """Print documents `start` and on: numbers, and the text with special tokens; what the mask counts is in colour on a
    terminal, else between ⟦ and ⟧ (⟦1: for turns before the last).

    The tokenizer is the one that `<prefix>.json` names unless a path is given. Raises UserError where either is not
    there or there is no such document.
    """
    out = sys.stdout if out is None else out
    metadata = read_metadata(prefix)
    if tokenizer_path is None:
        tokenizer_path = _recorded(prefix, metadata)
    stream = TokenStream(prefix, key="PREFIX")
    mask_prefix = f"{prefix}.mask"
    masks = None
    if Path(f"{mask_prefix}.idx").exists():
        if TokenStream(mask_prefix, key="PREFIX").num_tokens != stream.num_tokens:
            raise UserError(f"{mask_prefix}.bin is not the mask of {prefix}.bin: their numbers of tokens differ.")
        masks = _documents(mask_prefix)
    tokens = _documents(prefix)
    count = stream.num_documents
    if not 0 <= start < count:
        raise UserError(f"--start is {start}; {prefix} has documents 0 to {count - 1}.")
    if samples < 1:
        raise UserError(f"--samples is {samples}; it must be at least 1.")
    show = _Printer(load_tokenizer(tokenizer_path), out)
    kind = "text" if masks is None else "examples"
    show.line(f"{prefix}: {count:,} documents of {kind}, {stream.num_tokens:,} tokens")
    for number in range(start, min(start + samples, count)):
        show.document(number, _read(tokens, number), None if masks is None else _read(masks, number))


class _Printer:
    def __init__(self, tokenizer: Tokenizer, out: TextIO) -> None:
        self._tokenizer = tokenizer
        self._pieces = tokenizer.pieces()
        self._out = out
        self._console: Any = None
        if out.isatty():
            from rich.console import Console

            self._console = Console(file=out, highlight=False, soft_wrap=True)

    def line(self, line: str) -> None:
        self._print([(line, "")])

    def document(self, number: int, ids: Sequence[int], mask: Sequence[int] | None) -> None:
        head = f"── document {number}: {len(ids):,} tokens"
        if mask is not None:
            counts = {value: list(mask).count(value) for value in NAMES}
            parts = ", ".join(f"{count:,} {NAMES[value]}" for value, count in counts.items() if count)
            head += f", {sum(counts.values()):,} counted ({parts})" if parts else ", none counted"
        self._print([(head, "dim")])
        values = [CONTEXT] * len(ids) if mask is None else list(mask)
        parts_shown: list[tuple[str, str]] = []
        for value, group in groupby(zip(ids, values, strict=True), lambda pair: pair[1]):
            text = "".join(self._texts([index for index, _ in group]))
            if self._console is None:
                before, behind = MARKS.get(value, ("⟦?:", "⟧"))
                text = f"{before}{text}{behind}"
            parts_shown.append((text, STYLES.get(value, "red")))
        self._print(parts_shown)

    def _texts(self, ids: Sequence[int]) -> Iterator[str]:
        """The text of ids; sentencepiece decodes its control tokens to nothing, so these are shown as their pieces."""
        for decodes, group in groupby(ids, self._decodes):
            run = list(group)
            yield self._tokenizer.decode(run) if decodes else "".join(self._pieces[index] or "" for index in run)

    def _decodes(self, index: int) -> bool:
        return index not in (self._tokenizer.bos_id, self._tokenizer.eos_id)

    def _print(self, parts: Sequence[tuple[str, str]]) -> None:
        if self._console is None:
            print("".join(text for text, _ in parts), file=self._out)
            return
        from rich.text import Text

        self._console.print(Text.assemble(*parts))


def _recorded(prefix: str | Path, metadata: dict[str, Any] | None) -> str:
    if metadata is None:
        raise UserError(f"{metadata_path(prefix)} does not exist, so the tokenizer is not known. Give --tokenizer.")
    path: str = metadata["tokenizer"]["path"]
    if not Path(path).exists():
        raise UserError(f"the tokenizer {path} of {prefix} is not there any more. Give --tokenizer.")
    return path


def _documents(prefix: str | Path) -> Any:
    return IndexedDataset(str(prefix), mmap=True)


def _read(dataset: Any, number: int) -> list[int]:
    first, last = dataset.document_indices[number : number + 2]
    sequences: list[NDArray[np.integer[Any]]] = [dataset[int(place)] for place in range(first, last)]
    return [int(index) for sequence in sequences for index in sequence]
