"""Token files shown to a person: documents decoded, with what is learned of them marked."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from megatron.core.datasets.indexed_dataset import IndexedDataset
from numpy.typing import NDArray

from megakd.common.errors import UserError
from megakd.data.examples import has_weights
from megakd.data.fingerprint import metadata_path, read_metadata
from megakd.data.indexed import MASK_ENDING, WEIGHT_ENDING, IndexedStream, TokenStream, WeightStream
from megakd.data.records import CONTEXT, EARLIER, RESPONSE, SKIPPED
from megakd.data.tokenizer import Tokenizer, load_tokenizer

MARKS = {EARLIER: "1:", RESPONSE: "", SKIPPED: "0:"}
STYLES = {CONTEXT: "", EARLIER: "yellow", RESPONSE: "bold green", SKIPPED: "strike"}
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
    terminal, else between ⟦ and ⟧ (⟦1: for turns before the last, ⟦0: for those that are flagged not to be learned),
    and behind ⟦×W: where its weight W is not 1.

    The tokenizer is the one that `<prefix>.json` names unless a path is given. Raises UserError where either is not
    there, files are not of one data set or there is no such document.
    """
    out = sys.stdout if out is None else out
    metadata = read_metadata(prefix)
    if tokenizer_path is None:
        tokenizer_path = _recorded(prefix, metadata)
    stream = TokenStream(prefix, key="PREFIX")
    masks = weights = None
    if Path(f"{prefix}{MASK_ENDING}.idx").exists():
        masks = _beside(stream, TokenStream(f"{prefix}{MASK_ENDING}", key="PREFIX"))
    if has_weights(prefix, "PREFIX"):
        weights = _beside(stream, WeightStream(f"{prefix}{WEIGHT_ENDING}", key="PREFIX"))
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
        mask, weight = (None if files is None else _read(files, number) for files in (masks, weights))
        show.document(number, _read(tokens, number), mask, weight)


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

    def document(self, number: int, ids: list[Any], mask: list[Any] | None, weights: list[Any] | None) -> None:
        values = [CONTEXT] * len(ids) if mask is None else mask
        ones = [1.0] * len(ids) if weights is None else weights
        head = f"── document {number}: {len(ids):,} tokens"
        if mask is not None:
            counts = {value: mask.count(value) for value in NAMES}
            parts = ", ".join(f"{count:,} {NAMES[value]}" for value, count in counts.items() if count)
            head += f", {sum(counts.values()):,} counted ({parts})" if parts else ", none counted"
            if weights is not None and parts:
                total = sum(weight for weight, value in zip(ones, values, strict=True) if value in NAMES)
                head += f" of a weight of {total:,.6g} in all"
            if SKIPPED in mask:
                head += f", {mask.count(SKIPPED):,} flagged not to be learned"
        self._print([(head, "dim")])
        parts_shown: list[tuple[str, str]] = []
        for (value, weight), group in groupby(zip(ids, values, ones, strict=True), lambda token: token[1:]):
            text = "".join(self._texts([index for index, _, _ in group]))
            factor = f"×{weight:.6g}:" if weight != 1 and value in NAMES else ""
            if self._console is not None:
                text = factor + text
            elif value != CONTEXT:
                text = f"⟦{MARKS.get(value, '?:')}{factor}{text}⟧"
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


def _beside(tokens: IndexedStream, stream: IndexedStream) -> Any:
    """The documents of a mask or of weights, which must be those of the tokens."""
    if stream.num_tokens != tokens.num_tokens:
        raise UserError(
            f"{stream.prefix}.bin is not of {tokens.prefix}.bin: their numbers of tokens differ. Write the data again "
            "with tools/preprocess_data.py."
        )
    return _documents(stream.prefix)


def _read(dataset: Any, number: int) -> list[Any]:
    """A document's values, one for each token."""
    first, last = dataset.document_indices[number : number + 2]
    sequences: list[NDArray[Any]] = [dataset[int(place)] for place in range(first, last)]
    return [value for sequence in sequences for value in sequence.tolist()]
