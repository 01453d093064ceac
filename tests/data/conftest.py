"""Tokenizers trained in seconds, the quickstart teacher's folder, and streams held in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from numpy.typing import NDArray
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

REPOSITORY = Path(__file__).resolve().parents[2]
CORPUS = [
    "def add(a, b):\n    return a + b\n",
    "for i in range(10):\n    print(i, add(i, 42))\n",
    "import os\nimport sys\n\nprint(os.path.join('a', 'b'), sys.argv)\n",
    "naïve café, größer: 你好\n",
]


class MemoryStream:
    """A stream of given tokens."""

    prefix = "memory"

    def __init__(self, tokens: NDArray[np.int64]) -> None:
        self.num_tokens = len(tokens)
        self._tokens = tokens

    def slice(self, start: int, stop: int) -> NDArray[np.int64]:
        return self._tokens[start:stop].copy()


@pytest.fixture(scope="session")
def memory_stream() -> Callable[[int], MemoryStream]:
    """Makes a stream of n tokens that are all different, so that content shows where it came from."""
    return lambda num_tokens: MemoryStream(np.arange(num_tokens, dtype=np.int64) + 1000)


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return list(CORPUS)


@pytest.fixture(scope="session")
def hugging_face_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer in a Hugging Face folder: <s> is 0, </s> is 1."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator(CORPUS, trainer)
    folder = tmp_path_factory.mktemp("hugging_face")
    PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece BPE model with byte fallback: <s> is 1, </s> is 2."""
    prefix = tmp_path_factory.mktemp("sentencepiece") / "small"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose ids are the text's bytes; </s> is 256."""
    alphabet = bytes_to_unicode()
    vocabulary = {alphabet[byte]: byte for byte in range(256)}
    rust = RustTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.add_special_tokens(["</s>"])
    folder = tmp_path_factory.mktemp("bytes")
    PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def quickstart_teacher() -> Path:
    """The committed teacher: tokenizer.json and tokenizer.model with the same ids."""
    return REPOSITORY / "configs" / "quickstart" / "teacher"
