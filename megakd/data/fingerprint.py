"""What a data set remembers of its tokenizer, and the check that the teacher reads the same ids."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megakd.common.errors import UserError
from megakd.data.records import MASK_VERSION
from megakd.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer

FORMAT = "megakd-tokens"
VERSION = 1
BLOCK = 1024  # ids per hash
REMEDY = "Preprocess the data with the teacher's tokenizer (tools/preprocess_data.py --tokenizer {path})."

# Equal vocabularies can still be applied differently (merges, normalisation, a leading space): these texts show it.
# Changing them changes VERSION.
PROBE_TEXTS = (
    "The quick brown fox jumps over the lazy dog; it doesn't stop, however.",
    "def area(r: float) -> float:\n    if r < 0:\n        raise ValueError(f'{r!r}')\n    return 3.14159 * r ** 2\n",
    "#include <stdio.h>\nint main(void) { return x->y[0] != 0x1F && !z; }",
    "  two spaces first, a tab\there,\n\n\nthree line ends and spaces last   ",
    "\tindented\r\n\t\ttwice\r\n",
    "0 7 42 365 1999 31415 1000000 3.14 1e-5 12:30 2024-02-29",
    "Zażółć gęślą jaźń, Größe, naïve café, e\u0301, \u00a0no-break",
    "Съешь ещё этих мягких французских булок; 你好，世界。こんにちは 안녕하세요 مرحبا नमस्ते",
    "\U0001f642\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2200x \u2208 \u211d: \u2211 \ufb01 \u2460 \uff21",
    "<s>not a special token</s> <|endoftext|> [CLS] <unk> <0x0A>",
    "camelCase snake_case SCREAMING_CASE kebab-case https://example.org/a?b=c&d=%20#e",
    "x",
    " x",
)


class Difference(NamedTuple):
    """The first place where two tokenizers give different ids; an id is None past the end of its list."""

    text: int
    position: int
    id_a: int | None
    id_b: int | None


class TokenizerCheck(NamedTuple):
    """Whether the tokenizers could be compared, and the line to log about it."""

    checked: bool
    message: str


def first_difference(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> Difference | None:
    """The first id at which two tokenizers' ids of the same texts differ, or None."""
    assert len(a) == len(b), "ids of the same texts"
    for text, (ids_a, ids_b) in enumerate(zip(a, b, strict=True)):
        for position in range(max(len(ids_a), len(ids_b))):
            id_a = ids_a[position] if position < len(ids_a) else None
            id_b = ids_b[position] if position < len(ids_b) else None
            if id_a != id_b:
                return Difference(text, position, id_a, id_b)
    return None


def metadata_path(prefix: str | Path) -> Path:
    """The file beside `<prefix>.bin` that describes the data set."""
    return Path(f"{prefix}.json")


def vocabulary_path(prefix: str | Path) -> Path:
    """The file beside `<prefix>.bin` that lists the tokenizer's pieces by id."""
    return Path(f"{prefix}.vocab.json.gz")


def fingerprint(tokenizer: Tokenizer) -> dict[str, Any]:
    """What tells a tokenizer from others wherever its files lie: hashes of its pieces, ids of the probe texts."""
    return {
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eod_id": tokenizer.eos_id,
        "block": BLOCK,
        "pieces_sha256": _block_hashes(tokenizer.pieces()),
        "probe_ids": tokenizer.encode_batch(PROBE_TEXTS),
    }


def write_metadata(
    prefix: str | Path, tokenizer: Tokenizer, *, kind: str, documents: int, tokens: int, settings: Mapping[str, Any]
) -> None:
    """Write `<prefix>.json` and `<prefix>.vocab.json.gz`: counts, the tokenizer's fingerprint and its pieces.

    `kind` is "text", or "examples" where a mask lies beside the tokens; `settings` are further keys, such as
    `appended_eod`, and of examples `mask_version` and whether `weights` lie beside the mask.
    """
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "documents": documents,
        "tokens": tokens,
        **settings,
        "tokenizer": {"path": tokenizer.path, **fingerprint(tokenizer)},
    }
    metadata_path(prefix).write_text(json.dumps(metadata) + "\n", encoding="utf-8")
    packed = gzip.compress(json.dumps(tokenizer.pieces()).encode("ascii"), mtime=0)
    vocabulary_path(prefix).write_bytes(packed)


def read_metadata(prefix: str | Path) -> dict[str, Any] | None:
    """The contents of `<prefix>.json`, or None where there is no such file; raises UserError on any other file."""
    path = metadata_path(prefix)
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}). Write the data again with tools/preprocess_data.py.") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise UserError(f"{path} was not written by tools/preprocess_data.py. Move it away from the token files.")
    if metadata.get("version") != VERSION:
        raise UserError(
            f"{path} has format version {metadata.get('version')}; this version of megakd reads {VERSION}. "
            "Write the data again with tools/preprocess_data.py."
        )
    masks = metadata.get("mask_version", 1)
    if masks not in range(1, MASK_VERSION + 1):
        raise UserError(
            f"{path} says that the mask has version {masks}; this version of megakd reads 1 to {MASK_VERSION}. Update "
            "megakd, or write the data again with this version's tools/preprocess_data.py."
        )
    return metadata


def check_same_tokenizer(prefix: str | Path, teacher_path: str | Path, *, key: str = "data.train") -> TokenizerCheck:
    """Raise UserError, naming the first id that differs, unless the data's tokenizer is the teacher's.

    Every id of the data's tokenizer must be the same piece in the teacher's and the probe texts must give the same
    ids; the teacher may have further ids. Where either side cannot be known (data written by another tool, a
    teacher without tokenizer files) nothing is compared: `checked` is False and `message` says so. `key` is the
    configuration key that messages name.
    """
    metadata = read_metadata(prefix)
    if metadata is None:
        reason = f"{metadata_path(prefix)} is missing (data written by another tool)"
        return TokenizerCheck(False, f"{key}: not checked against the teacher's tokenizer: {reason}")
    if not has_tokenizer(teacher_path):
        reason = f"{teacher_path} holds no tokenizer files"
        return TokenizerCheck(False, f"{key}: not checked against the teacher's tokenizer: {reason}")
    teacher = load_tokenizer(teacher_path)
    recorded = metadata["tokenizer"]
    remedy = REMEDY.format(path=teacher_path)
    found = _vocabulary_difference(prefix, recorded, teacher.pieces())
    if found is None:
        found = _probe_difference(recorded["probe_ids"], teacher)
    if found is not None:
        raise UserError(f"{key}: tokenizer of {prefix} differs from the teacher's {found}. {remedy}")
    return TokenizerCheck(True, f"{key}: tokenizer is the teacher's ({recorded['vocab_size']} ids compared)")


def _vocabulary_difference(prefix: str | Path, recorded: dict[str, Any], teacher: list[str | None]) -> str | None:
    size: int = recorded["vocab_size"]
    hashes: list[str] = recorded["pieces_sha256"]
    # The teacher's ids beyond the data's size never occur in the data.
    teacher_hashes = _block_hashes(teacher[:size])
    different = [i for i, (a, b) in enumerate(zip(hashes, teacher_hashes, strict=False)) if a != b]
    if not different and len(teacher) >= size:
        return None
    try:
        pieces: list[str | None] = json.loads(gzip.decompress(vocabulary_path(prefix).read_bytes()))
    except (OSError, EOFError, ValueError):
        start = different[0] * BLOCK if different else len(teacher)
        return f"in the ids {start} to {min(start + BLOCK, size) - 1} ({vocabulary_path(prefix)} would name the id)"
    for i in range(size):
        other = teacher[i] if i < len(teacher) else None
        if pieces[i] != other:
            return f"at id {i}: {_shown(pieces[i])} there, {_shown(other)} in the teacher"
    return f"by {metadata_path(prefix)}, which contradicts {vocabulary_path(prefix)}: the files are not of one data set"


def _probe_difference(recorded: list[list[int]], teacher: Tokenizer) -> str | None:
    difference = first_difference(recorded, teacher.encode_batch(PROBE_TEXTS))
    if difference is None:
        return None
    text, position, data_id, teacher_id = difference
    return (
        f"though the pieces are the same: token {position} of the text {PROBE_TEXTS[text]!r} "
        f"is id {data_id} there, {teacher_id} in the teacher"
    )


def _block_hashes(pieces: Sequence[str | None]) -> list[str]:
    blocks = (pieces[start : start + BLOCK] for start in range(0, len(pieces), BLOCK))
    return [hashlib.sha256(json.dumps(list(block)).encode("ascii")).hexdigest() for block in blocks]


def _shown(piece: str | None) -> str:
    return "no piece" if piece is None else repr(piece)
