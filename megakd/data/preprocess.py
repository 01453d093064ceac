"""Text to token files: read documents, encode them, write a complete data set or nothing."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megakd.common.errors import UserError
from megakd.data.encoding import encode_documents
from megakd.data.fingerprint import metadata_path, vocabulary_path, write_metadata
from megakd.data.token_writer import TokenWriter, token_dtype
from megakd.data.tokenizer import Tokenizer, load_tokenizer

Format = Literal["auto", "jsonl", "text"]
JSONL_ENDINGS = (".jsonl", ".ndjson")
EMPTY = "empty"
NOT_TEXT = "not UTF-8 text"


@dataclass(frozen=True)
class Summary:
    """What a run wrote: counts, the longest document in tokens, and what was dropped, by reason."""

    prefix: str
    documents: int
    tokens: int
    longest: int
    seconds: float
    dropped: dict[str, int]

    def lines(self) -> list[str]:
        """The summary as a person reads it."""
        rate = self.tokens / max(self.seconds, 1e-9)
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        return [
            f"{self.prefix}.bin, .idx: {self.documents:,} documents, {self.tokens:,} tokens",
            f"longest document {self.longest:,} tokens; {rate:,.0f} tokens/s in {self.seconds:.1f} s",
            f"dropped: {reasons or 'nothing'}",
        ]


def preprocess(
    inputs: Sequence[str],
    prefix: str | Path,
    tokenizer_path: str | Path,
    *,
    format: Format = "auto",
    json_key: str = "text",
    append_eod: bool = True,
    prepend_bos: bool = False,
    workers: int = 1,
    overwrite: bool = False,
) -> Summary:
    """Turn files, folders and glob patterns into `<prefix>.bin/.idx`, in the order given, folders sorted.

    JSONL files (`auto`: by their ending) hold a document per line under `json_key`; any other file is one
    document. Text files that are not UTF-8 and documents without tokens are dropped and counted. Raises
    UserError, leaving nothing behind, at the first broken JSON line and where no document is left.
    """
    _check_outputs(prefix, overwrite)
    files = find_files(inputs)
    outputs = {path.resolve() for path in _output_paths(prefix)}
    for file in files:
        if file.resolve() in outputs:
            raise UserError(f"{file} is an input and an output of this run. Choose another --output-prefix.")
    tokenizer = load_tokenizer(tokenizer_path)
    dropped: Counter[str] = Counter()
    return write_documents(
        read_documents(files, format=format, json_key=json_key, dropped=dropped),
        prefix,
        tokenizer,
        append_eod=append_eod,
        prepend_bos=prepend_bos,
        workers=workers,
        overwrite=overwrite,
        dropped=dropped,
    )


def write_documents(
    documents: Iterable[str],
    prefix: str | Path,
    tokenizer: Tokenizer,
    *,
    append_eod: bool = True,
    prepend_bos: bool = False,
    workers: int = 1,
    overwrite: bool = False,
    dropped: Counter[str] | None = None,
) -> Summary:
    """Write documents as [bos] + ids + [eos] to `<prefix>.bin/.idx`, with the tokenizer's fingerprint beside them.

    The files are written aside and renamed at the end, the index last, so that a run that is interrupted leaves no
    data set. `dropped` is what the documents' reader drops while it is read. Raises UserError where no document
    is left, the tokenizer lacks a token that is asked for, or the output exists and `overwrite` is False.
    """
    _check_outputs(prefix, overwrite)
    head = _special(tokenizer, "bos", tokenizer.bos_id, "Leave out --prepend-bos.") if prepend_bos else []
    tail = _special(tokenizer, "eos", tokenizer.eos_id, "Use --no-append-eod.") if append_eod else []
    dropped = Counter() if dropped is None else dropped
    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    count = tokens = longest = 0
    aside = Path(tempfile.mkdtemp(prefix=f".{prefix.name}-", suffix=".partial", dir=prefix.parent))
    try:
        writer = TokenWriter(aside / "data", token_dtype(tokenizer.vocab_size))
        try:
            for ids in encode_documents(documents, tokenizer, workers):
                if not ids:
                    dropped[EMPTY] += 1
                    continue
                length = len(head) + len(ids) + len(tail)
                writer.add(np.array([*head, *ids, *tail]), np.array([length], dtype=np.int32))
                count, tokens, longest = count + 1, tokens + length, max(longest, length)
            if not count:
                raise UserError(_nothing_left(prefix, dropped))
            writer.finish()
        finally:
            writer.close()
        write_metadata(
            aside / "data",
            tokenizer,
            documents=count,
            tokens=tokens,
            appended_eod=append_eod,
            prepended_bos=prepend_bos,
        )
        _publish(aside / "data", prefix)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Summary(str(prefix), count, tokens, longest, time.perf_counter() - started, dict(dropped))


def find_files(inputs: Sequence[str]) -> list[Path]:
    """The files that the inputs name: files, folders (walked, sorted, without dot files) and glob patterns."""
    files: list[Path] = []
    for text in inputs:
        path = Path(text)
        paths = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(text, recursive=True))]
        if not paths:
            raise UserError(f"--input {text}: no such file or folder, and no file matches it as a pattern.")
        for found in paths:
            # A pattern such as ** names a folder and, besides, every file in it.
            if found.is_file():
                files.append(found)
            elif path.exists():
                files.extend(_walk(found))
    if not files:
        raise UserError(
            f"--input {' '.join(inputs)}: no file is there. Name files, folders or patterns that hold text."
        )
    return files


def read_documents(
    files: Iterable[Path], *, format: Format = "auto", json_key: str = "text", dropped: Counter[str]
) -> Iterator[str]:
    """Yield the documents of the files; text files that are not UTF-8 are counted in `dropped`."""
    for file in files:
        if format == "jsonl" or (format == "auto" and file.suffix.lower() in JSONL_ENDINGS):
            yield from _read_jsonl(file, json_key)
            continue
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            dropped[NOT_TEXT] += 1
            continue
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}).") from error
        yield text


def _read_jsonl(file: Path, json_key: str) -> Iterator[str]:
    try:
        lines = file.open("rb")  # bytes end lines at \n only; text mode has other ideas
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}).") from error
    with lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _json_text(line, f"{file}:{number}", json_key)


def _json_text(line: bytes, place: str, json_key: str) -> str:
    remedy = "Correct or remove the line."
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not a line of JSON ({error}). {remedy}") from error
    if not isinstance(record, dict):
        raise UserError(f"{place}: a {type(record).__name__}, not a JSON object. {remedy}")
    if json_key not in record:
        keys = ", ".join(record) or "none"
        raise UserError(f"{place}: no key '{json_key}' (keys there: {keys}). Name the text's key with --json-key.")
    text = record[json_key]
    if not isinstance(text, str):
        raise UserError(f"{place}: '{json_key}' is a {type(text).__name__}, not a string. {remedy}")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{place}: '{json_key}' has half of a surrogate pair, which is no text. {remedy}")
    return text


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(root, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _special(tokenizer: Tokenizer, name: str, index: int | None, remedy: str) -> list[int]:
    if index is None:
        raise UserError(f"the tokenizer {tokenizer.path} has no {name} token. {remedy}")
    return [index]


def _output_paths(prefix: str | Path) -> list[Path]:
    # The index is last: without it nobody takes the others for a data set.
    return [Path(f"{prefix}.bin"), vocabulary_path(prefix), metadata_path(prefix), Path(f"{prefix}.idx")]


def _check_outputs(prefix: str | Path, overwrite: bool) -> None:
    if Path(prefix).name in ("", ".", "..") or str(prefix).endswith(("/", os.sep)):
        raise UserError(f"--output-prefix {prefix} names a folder. Add a name, for example {Path(prefix) / 'train'}.")
    for path in _output_paths(prefix):
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists. Use --overwrite to replace it, or another --output-prefix.")


def _publish(aside: Path, prefix: Path) -> None:
    Path(f"{prefix}.idx").unlink(missing_ok=True)
    for source, target in zip(_output_paths(aside), _output_paths(prefix), strict=True):
        os.replace(source, target)


def _nothing_left(prefix: Path, dropped: Counter[str]) -> str:
    reasons = ", ".join(f"{count} dropped as {reason}" for reason, count in sorted(dropped.items()))
    return f"no document for {prefix}: the input has {reasons or 'none'}. Nothing was written; check --input."
