"""Tokenizers behind one protocol: Hugging Face folders and sentencepiece models."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from megakd.common.errors import UserError

SENTENCEPIECE_FILE = "tokenizer.model"
# Any of these makes a folder one that transformers can build a tokenizer from.
HUGGING_FACE_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")


class Tokenizer(Protocol):
    """Text to ids and back, without special tokens added and without special tokens found in the text.

    Encoding may be called from several threads at once. `vocab_size` is the largest id plus one. `bos_id` and `eos_id`
    are None where the tokenizer has none.
    """

    path: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def pieces(self) -> list[str | None]:
        """The vocabulary's pieces by id; None where an id has none."""
        ...

    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text: those that begin, end and part texts."""
        ...


class HuggingFaceTokenizer:
    """A tokenizer that transformers loads from a folder; code found in the folder is never run."""

    def __init__(self, folder: Path) -> None:
        # Importing transformers takes seconds, and sentencepiece models do without it.
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the Rust tokenizers raise bare Exception
            reason = " ".join(str(error).split())
            raise UserError(
                f"{folder} holds no tokenizer that transformers can load ({type(error).__name__}: {reason[:300]}). "
                "Give a folder saved with save_pretrained, or a sentencepiece .model file."
            ) from error
        self.path = str(folder)
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        # A class that overrides either of these does something to the text before the Rust tokenizer has it.
        self.is_plain_rust = isinstance(tokenizer, PreTrainedTokenizerFast) and all(
            getattr(type(tokenizer), name) is getattr(PreTrainedTokenizerFast, name)
            for name in ("__call__", "_encode_plus")
        )
        self._ids: dict[str, int] = tokenizer.get_vocab()
        self.vocab_size = max(self._ids.values(), default=-1) + 1
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]]
        if self.is_plain_rust:
            encodings = self._rust.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in encodings]
        with self._lock:  # transformers changes the tokenizer's state on every call
            # Without split_special_tokens a document that mentions "</s>" would end there.
            ids = self._tokenizer(
                list(texts),
                add_special_tokens=False,
                split_special_tokens=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
        return ids

    @property
    def transformers_tokenizer(self) -> Any:
        """The tokenizer as transformers has it; whoever changes it changes this one."""
        return self._tokenizer

    @cached_property
    def _rust(self) -> Any:
        """The Rust tokenizer that transformers calls, set as it would set it; a copy, which nobody else changes."""
        rust: Any = copy.deepcopy(self._tokenizer.backend_tokenizer)
        rust.no_truncation()
        rust.no_padding()
        rust.encode_special_tokens = True
        return rust

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def pieces(self) -> list[str | None]:
        pieces: list[str | None] = [None] * self.vocab_size
        for piece, index in self._ids.items():
            pieces[index] = piece
        return pieces

    def special_ids(self) -> frozenset[int]:
        added = self._tokenizer.added_tokens_decoder
        return frozenset(self._tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}


class SentencePieceTokenizer:
    """A sentencepiece `.model` file read with the sentencepiece library itself."""

    def __init__(self, model_file: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._model: Any = SentencePieceProcessor(model_file=str(model_file))
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{model_file} is no sentencepiece model ({' '.join(str(error).split())[:300]}). "
                "Give a .model file written by sentencepiece, or a Hugging Face folder."
            ) from error
        self.path = str(model_file)
        self.vocab_size = int(self._model.vocab_size())
        self.bos_id = _id_or_none(self._model.bos_id())
        self.eos_id = _id_or_none(self._model.eos_id())

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._model.encode(list(texts))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._model.decode([int(i) for i in ids])
        return text

    def pieces(self) -> list[str | None]:
        return [self._model.id_to_piece(i) for i in range(self.vocab_size)]

    def special_ids(self) -> frozenset[int]:
        return frozenset(i for i in range(self.vocab_size) if self._model.is_control(i))


def has_tokenizer(path: str | Path) -> bool:
    """Whether `path` is a file, or a folder with a tokenizer's files in it."""
    path = Path(path)
    return path.is_file() or any((path / name).is_file() for name in (*HUGGING_FACE_FILES, SENTENCEPIECE_FILE))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a Hugging Face folder, a sentencepiece `.model` file or a folder that holds only tokenizer.model.

    Nothing is downloaded and no code from the folder is run. Raises UserError where `path` is none of them.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix == ".json":
            raise UserError(f"{path} is a file; a Hugging Face tokenizer is given by its folder. Use {path.parent}.")
        return SentencePieceTokenizer(path)
    if not path.is_dir():
        raise UserError(
            f"tokenizer {path} does not exist. Give a Hugging Face folder (tokenizer.json and the files beside it) "
            "or a sentencepiece .model file."
        )
    if any((path / name).is_file() for name in HUGGING_FACE_FILES):
        return HuggingFaceTokenizer(path)
    if (path / SENTENCEPIECE_FILE).is_file():
        return SentencePieceTokenizer(path / SENTENCEPIECE_FILE)
    raise UserError(
        f"{path} holds no tokenizer: none of {', '.join((*HUGGING_FACE_FILES, SENTENCEPIECE_FILE))} is there. "
        "Give the folder of the teacher or the tokenizer's own folder."
    )


def _id_or_none(index: int) -> int | None:
    return index if index >= 0 else None
