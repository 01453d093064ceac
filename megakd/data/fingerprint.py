"""What a data set remembers of its tokenizer, and the check that the models read the same ids."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megakd.common.errors import UserError
from megakd.data.records import MASK_VERSION
from megakd.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer

FORMAT = "megakd-tokens"
VERSION = 1
BLOCK = 1024  # ids per hash
REMEDY = "Preprocess the data with the {role}'s tokenizer (tools/preprocess_data.py --tokenizer {path})."
_PIECES_SHOWN = 3

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


class ModelTokenizer(NamedTuple):
    """A model whose tokenizer data is held against: its role in messages, the setting that names it, its folder."""

    role: str
    setting: str
    path: str


class TokenizerDifference(NamedTuple):
    """How a model's tokenizer differs from the data's; `text` is None where every id of the data is the same.

    With `lacks_end` it lacks ids that the data holds, and is the same otherwise. `unused` are ids that it lacks and
    the data does not hold.
    """

    text: str | None
    lacks_end: bool = False
    unused: str | None = None


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
    prefix: str | Path,
    tokenizer: Tokenizer,
    *,
    kind: str,
    documents: int,
    tokens: int,
    settings: Mapping[str, Any],
    max_id: int | None = None,
) -> None:
    """Write `<prefix>.json` and `<prefix>.vocab.json.gz`: counts, the tokenizer's fingerprint and its pieces.

    `kind` is "text", or "examples" where a mask lies beside the tokens; `settings` are further keys, such as
    `appended_eod`, and of examples `mask_version` and whether `weights` lie beside the mask. `max_id` is the largest id
    of the tokens, None where that is not known.
    """
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "documents": documents,
        "tokens": tokens,
        **({} if max_id is None else {"max_id": max_id}),
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


def check_same_tokenizer(
    prefix: str | Path,
    models: Sequence[ModelTokenizer],
    *,
    key: str = "data.train",
    load: Callable[[str | Path], Tokenizer] = load_tokenizer,
) -> list[str]:
    """Check that the models' tokenizers give the data's ids: the same pieces, and the same ids of the probe texts.

    A model's tokenizer may have further ids, and may lack those at its end that the data does not hold.

    Args:
        models: those that read the data, the teacher before its student.
        key: the configuration key that messages name.
        load: gives a folder's tokenizer, which need not be read again for each data set.

    Returns:
        Lines to log: what could not be compared (data written by another tool, a model without tokenizer files) and
        which ids a tokenizer lacks.

    Raises:
        UserError: a tokenizer differs; the message blames the model that does, and names the first id.
    """
    metadata = read_metadata(prefix)
    if metadata is None:
        names = " and ".join(f"the {model.role}'s" for model in models)
        reason = f"{metadata_path(prefix)} is missing (data written by another tool)"
        return [f"{key}: not checked against {names} tokenizer: {reason}"] if models else []
    recorded = DataTokenizer(prefix, metadata)
    lines, same, different = [], [], []
    for model in models:
        if not has_tokenizer(model.path):
            reason = f"{model.path} holds no tokenizer files"
            lines.append(f"{key}: not checked against the {model.role}'s tokenizer: {reason}")
            continue
        found = recorded.compare(load(model.path), model.role)
        if found.text is None:
            same.append(model)
        else:
            different.append((model, found))
        if found.unused:
            lines.append(f"{key}: the {model.role}'s tokenizer lacks {found.unused}; the data holds none of these ids")
    if different:
        raise UserError(_blame(prefix, key, metadata["tokenizer"]["path"], same, different, load))
    return lines


class DataTokenizer:
    """The tokenizer that a data set was written with, as its description tells."""

    def __init__(self, prefix: str | Path, metadata: Mapping[str, Any]) -> None:
        self._prefix = prefix
        self._recorded: Mapping[str, Any] = metadata["tokenizer"]
        self._size: int = self._recorded["vocab_size"]
        largest = metadata.get("max_id")
        # Ids of which the data may hold any.
        self._used = self._size if largest is None else largest + 1

    def compare(self, other: Tokenizer, role: str) -> TokenizerDifference:
        """How the tokenizer of a model differs from the data's."""
        pieces = other.pieces()
        shared = min(self._size, len(pieces))
        text = self._piece_difference(pieces, shared, role) or self._probe_difference(other, role)
        if text is not None or shared == self._size:
            return TokenizerDifference(text)
        lacking = self._lacking(shared)
        if self._used <= shared:
            return TokenizerDifference(None, unused=lacking)
        return TokenizerDifference(f"at its end: it lacks {lacking}", lacks_end=True)

    def _piece_difference(self, others: list[str | None], shared: int, role: str) -> str | None:
        """The first of the ids that both have which is another piece."""
        hashes, other_hashes = self._recorded["pieces_sha256"], _block_hashes(others[: self._size])
        different = [i for i, (a, b) in enumerate(zip(hashes, other_hashes, strict=False)) if a != b]
        if not different:
            return None
        start = different[0] * BLOCK
        pieces = self._pieces()
        if pieces is None:
            path = vocabulary_path(self._prefix)
            return f"in the ids {start} to {min(start + BLOCK, self._size) - 1} ({path} would name the id)"
        for i in range(start, shared):
            if pieces[i] != others[i]:
                return f"at id {i}: {_shown(pieces[i])} in the data, {_shown(others[i])} in the {role}"
        if shared < self._size:
            return None
        paths = f"{metadata_path(self._prefix)}, which contradicts {vocabulary_path(self._prefix)}"
        return f"by {paths}: the files are not of one data set"

    def _probe_difference(self, other: Tokenizer, role: str) -> str | None:
        difference = first_difference(self._recorded["probe_ids"], other.encode_batch(PROBE_TEXTS))
        if difference is None:
            return None
        text, position, data_id, model_id = difference
        return (
            f"though the pieces are the same: token {position} of the text {PROBE_TEXTS[text]!r} "
            f"is id {data_id} in the data, {model_id} in the {role}"
        )

    def _pieces(self) -> list[str | None] | None:
        try:
            pieces: list[str | None] = json.loads(gzip.decompress(vocabulary_path(self._prefix).read_bytes()))
        except (OSError, EOFError, ValueError):
            return None
        return pieces if len(pieces) == self._size else None

    def _lacking(self, shared: int) -> str:
        """The ids from `shared` on, with the first of their pieces."""
        pieces, count = self._pieces(), self._size - shared
        ids = f"the id {shared}" if count == 1 else f"the ids {shared} to {self._size - 1}"
        if pieces is None:
            return ids
        shown = ", ".join(_shown(piece) for piece in pieces[shared : shared + _PIECES_SHOWN])
        return f"{ids} ({shown}{', ...' if count > _PIECES_SHOWN else ''})"


def _blame(
    prefix: str | Path,
    key: str,
    data_tokenizer: str,
    same: Sequence[ModelTokenizer],
    different: Sequence[tuple[ModelTokenizer, TokenizerDifference]],
    load: Callable[[str | Path], Tokenizer],
) -> str:
    """Which model's tokenizer differs from the data's, and what helps; no advice costs the data a token."""
    model, found = different[0]
    told = f"{key}: tokenizer of {prefix} differs from the {model.role}'s ({model.setting}: {model.path}) {found.text}"
    others = [other for other, _ in different[1:]]
    if others:
        told += f"; it differs from the {others[0].role}'s ({others[0].setting}: {others[0].path}) too"
    elif same:
        told += f"; it is the {same[0].role}'s"
    if all(difference.lacks_end for _, difference in different):
        roles = " and ".join(f"the {other.role}" for other, _ in different)
        return (
            f"{told}. Add these tokens to {roles}: save the data's tokenizer ({data_tokenizer}) in the model's folder "
            "and resize its embedding (resize_token_embeddings in transformers)."
        )
    teacher = model if model.role == "teacher" else next((other for other in same if other.role == "teacher"), model)
    again = REMEDY.format(role=teacher.role, path=teacher.path)
    if others and fingerprint(load(model.path)) == fingerprint(load(others[0].path)):
        return f"{told}, as that is the {model.role}'s. {again}"
    if others:
        return f"{told}, and both are different. Start from a student with the teacher's tokenizer, and: {again}"
    if not same:
        return f"{told}. {again}"
    if model.role == "student":
        return f"{told}. Start from a student with the teacher's tokenizer ({model.setting})."
    return (
        f"{told}. Name a teacher with the {same[0].role}'s tokenizer, or start from a student with the teacher's "
        f"({same[0].setting}), and: {again}"
    )


def _block_hashes(pieces: Sequence[str | None]) -> list[str]:
    blocks = (pieces[start : start + BLOCK] for start in range(0, len(pieces), BLOCK))
    return [hashlib.sha256(json.dumps(list(block)).encode("ascii")).hexdigest() for block in blocks]


def _shown(piece: str | None) -> str:
    return "no piece" if piece is None else repr(piece)
