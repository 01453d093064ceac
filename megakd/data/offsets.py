"""Token ids with the characters each token holds, and masks made from spans of characters."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megakd.common.errors import UserError
from megakd.data.records import EARLIER, RESPONSE, SKIPPED
from megakd.data.tokenizer import HuggingFaceTokenizer, Tokenizer


class Tokens(NamedTuple):
    """Ids [n] of a text and the characters [start, end) that each token holds."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


class Turn(NamedTuple):
    """The characters [start, end) that the assistant writes in one turn; `last` in the example's last such turn.

    `weight` multiplies its tokens' loss: 1 where nothing is said, 0 where it is not to be learned.
    """

    start: int
    end: int
    last: bool
    weight: float = 1.0

    @property
    def is_skipped(self) -> bool:
        """Whether none of it is to be learned: its weight is 0, as float32 has it."""
        return bool(np.float32(self.weight) == 0)


def require_offsets(tokenizer: Tokenizer) -> HuggingFaceTokenizer:
    """The tokenizer itself; raises UserError where it cannot say which characters its tokens hold."""
    if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.is_plain_rust:
        return tokenizer
    raise UserError(
        f"the tokenizer {tokenizer.path} cannot say which characters its tokens hold, as chats and instructions need. "
        "Give a Hugging Face folder with a tokenizer.json (AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER) "
        "writes one for most models)."
    )


class OffsetTokenizer:
    """Tokenizes as transformers' apply_chat_template does: special tokens are found in the text and none is added."""

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        own = tokenizer.transformers_tokenizer
        rust: Any = copy.deepcopy(own.backend_tokenizer)
        rust.no_truncation()
        rust.no_padding()
        rust.encode_special_tokens = own.split_special_tokens
        # Without special tokens to add it could only trim spaces off the offsets.
        rust.post_processor = None
        self._rust = rust
        # These take neighbouring spaces in, which are no part of what they say.
        self._greedy = {
            index: token.content for index, token in own.added_tokens_decoder.items() if token.lstrip or token.rstrip
        }

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """One result per text; texts have no halves of surrogate pairs."""
        if not texts:
            return []
        encodings = self._rust.encode_batch(list(texts), add_special_tokens=False)
        return [self._tokens(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def _tokens(self, text: str, encoding: Any) -> Tokens:
        ids = np.array(encoding.ids, dtype=np.int32)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        starts, ends = offsets[:, 0].copy(), offsets[:, 1].copy()
        if self._greedy:
            for place in np.flatnonzero(np.isin(ids, list(self._greedy))):
                content = self._greedy[int(ids[place])]
                found = text.find(content, starts[place], ends[place])
                if found >= 0:
                    starts[place], ends[place] = found, found + len(content)
        return Tokens(ids, starts, ends)


def turn_mask(tokens: Tokens, turns: Iterable[Turn]) -> NDArray[np.uint8]:
    """The mask [n] of tokens that hold at least one character of a turn: RESPONSE in the last, EARLIER in others,
    SKIPPED in those of weight 0.

    A token without characters counts where the turn's text goes on behind it. One that two turns share is SKIPPED where
    either is, so that nothing flagged is learned, and else of the last turn.
    """
    mask = np.zeros(len(tokens.ids), dtype=np.uint8)
    for turn, held in _held(tokens, turns):
        value = SKIPPED if turn.is_skipped else RESPONSE if turn.last else EARLIER
        mask[held] = np.maximum(mask[held], value)
    return mask


def turn_weights(tokens: Tokens, turns: Iterable[Turn]) -> NDArray[np.float32] | None:
    """The weights [n] of the turns' tokens, or None where all are 1, as they are outside of turns.

    A token that two turns share has the smaller of their weights. Turns of weight 0 have 1 here: the mask leaves their
    tokens out.
    """
    weights = np.ones(len(tokens.ids), dtype=np.float32)
    for turn, held in _held(tokens, sorted(turns, key=lambda turn: -turn.weight)):
        if not turn.is_skipped:
            weights[held] = turn.weight
    return weights if (weights != 1).any() else None


def _held(tokens: Tokens, turns: Iterable[Turn]) -> Iterator[tuple[Turn, NDArray[np.bool_]]]:
    """Turns with text, each with which tokens [n] hold a part of it."""
    # One character's several tokens each have all of it.
    reach = np.maximum(tokens.ends, tokens.starts + 1)
    for turn in turns:
        if turn.start < turn.end:
            yield turn, (tokens.starts < turn.end) & (reach > turn.start)
