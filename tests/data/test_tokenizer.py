"""Both kinds of tokenizer give the ids their own libraries give, and bad paths are told clearly."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from megakd.common.errors import UserError
from megakd.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, has_tokenizer, load_tokenizer


def test_hugging_face_ids_are_the_tokenizers_library_s(hugging_face_folder: Path, corpus: list[str]) -> None:
    reference = RustTokenizer.from_file(str(hugging_face_folder / "tokenizer.json"))
    tokenizer = load_tokenizer(hugging_face_folder)
    expected = [reference.encode(text, add_special_tokens=False).ids for text in corpus]
    assert tokenizer.encode_batch(corpus) == expected
    assert [tokenizer.encode(text) for text in corpus] == expected
    assert [tokenizer.decode(ids) for ids in expected] == corpus
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.vocab_size == reference.get_vocab_size()
    assert tokenizer.pieces() == [reference.id_to_token(i) for i in range(tokenizer.vocab_size)]
    assert tokenizer.encode_batch([]) == [] and tokenizer.encode("") == []


def test_sentencepiece_ids_are_the_library_s(sentencepiece_file: Path, corpus: list[str]) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    tokenizer = load_tokenizer(sentencepiece_file)
    assert tokenizer.encode_batch(corpus) == [reference.encode(text) for text in corpus]
    assert tokenizer.encode(corpus[0]) == reference.encode(corpus[0])
    assert tokenizer.decode(reference.encode("print(i)")) == "print(i)"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, reference.vocab_size())


def test_sentencepiece_model_without_bos(tmp_path: Path, corpus: list[str]) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus * 4),
        model_prefix=str(tmp_path / "m"),
        vocab_size=60,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "m.model")
    assert tokenizer.bos_id is None and tokenizer.eos_id is not None


def test_special_tokens_in_text_are_text(hugging_face_folder: Path, quickstart_teacher: Path) -> None:
    for folder in (hugging_face_folder, quickstart_teacher):
        tokenizer = load_tokenizer(folder)
        ids = tokenizer.encode("a</s>b<s>")
        assert tokenizer.eos_id not in ids and tokenizer.bos_id not in ids
        assert tokenizer.decode(ids) == "a</s>b<s>"


def test_folder_with_only_a_sentencepiece_model(sentencepiece_file: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert has_tokenizer(tmp_path) and has_tokenizer(sentencepiece_file)


def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="holds no tokenizer that transformers can load"):
        load_tokenizer(tmp_path)
    assert not marker.exists()


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist. Give a Hugging Face folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no tokenizer: none of tokenizer.json"):
        load_tokenizer(tmp_path)
    assert not has_tokenizer(tmp_path) and not has_tokenizer(tmp_path / "nowhere")
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="is no sentencepiece model"):
        load_tokenizer(tmp_path / "broken.model")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer.json is a file; .* Use "):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="holds no tokenizer that transformers can load"):
        load_tokenizer(tmp_path)


TEXTS = [
    "a</s>b<s> c [CLS] [UNK]<extra>x  y",
    "  two\n\n\ttabs ",
    "Größe naïve 你好 \U0001f642\u200d e\u0301",
    "",
    " ",
    "\0 nul \r\n",
    "word " * 3000,
]


def word_piece() -> RustTokenizer:
    trained = RustTokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizers.BertNormalizer()
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    trained.train_from_iterator(TEXTS, trainer)
    trained.post_processor = processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 1)])
    return trained


def unigram() -> RustTokenizer:
    trained = RustTokenizer(models.Unigram())
    trained.normalizer = normalizers.NFKC()
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=100, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(TEXTS, trainer)
    return trained


@pytest.mark.parametrize("make", [None, word_piece, unigram])
def test_the_rust_tokenizer_called_directly_gives_transformers_ids(
    make: Callable[[], RustTokenizer] | None, hugging_face_folder: Path, tmp_path: Path
) -> None:
    folder = hugging_face_folder
    if make is not None:
        rust = make()
        rust.add_tokens(["<extra>"])
        rust.enable_truncation(max_length=5)
        rust.enable_padding(length=9)
        folder = tmp_path
        PreTrainedTokenizerFast(tokenizer_object=rust).save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.is_plain_rust
    transformers = AutoTokenizer.from_pretrained(str(folder))
    expected = transformers(TEXTS, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    assert tokenizer.encode_batch(TEXTS) == expected
    assert tokenizer.encode_batch([]) == [] and max(map(len, expected)) > 9


def test_a_tokenizer_without_rust_and_a_class_of_its_own_go_through_transformers(tmp_path: Path) -> None:
    # One byte per token, in Python.
    ByT5Tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, HuggingFaceTokenizer) and not tokenizer.is_plain_rust
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(tokenizer.encode_batch, [TEXTS] * 8))
    assert results == [[[byte + 3 for byte in text.encode()] for text in TEXTS]] * 8
