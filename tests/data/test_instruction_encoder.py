"""Prompts with responses: whose tokens are whose, with and without a chat template."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megakd.common.errors import UserError
from megakd.data.chat_encoder import TemplateSettings
from megakd.data.instruction_encoder import InstructionSettings
from megakd.data.records import NO_END, SPECIAL_TEXT, Encoded, Problem
from megakd.data.tokenizer import load_tokenizer
from tests.data.chat_tokenizers import byte_level, metaspace, template

MERGES = ((":", "Ġ"), ("o", "n"), ("on", "e"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(tmp_path_factory.mktemp("instructions"), MERGES)


def encode(folder: Path, record: dict[str, Any], **options: Any) -> Encoded | Problem:
    settings = pickle.loads(pickle.dumps(InstructionSettings(**options)))
    assert set(record) & set(settings.fields)
    [result] = settings.build(load_tokenizer(folder)).encode([record])
    return result


def tokens(folder: Path, example: Encoded | Problem) -> list[tuple[str, int]]:
    assert isinstance(example, Encoded) and example.mask is not None
    tokenizer = load_tokenizer(folder)
    return list(zip([tokenizer.decode([i]) for i in example.ids], example.mask.tolist(), strict=True))


def test_the_response_and_eos_count(folder: Path) -> None:
    assert tokens(folder, encode(folder, {"prompt": "q", "response": "one!"})) == [
        ("q", 0), ("one", 2), ("!", 2), ("</s>", 2),
    ]  # fmt: skip


def test_eos_weighs_what_the_response_weighs(folder: Path) -> None:
    settings = InstructionSettings(prepend_bos=True)
    record = {"prompt": "q", "response": "one!", "weight": 0.5}
    [example] = settings.build(load_tokenizer(folder)).encode([record])
    assert isinstance(example, Encoded) and example.weights is not None
    assert tokens(folder, example) == [("<s>", 0), ("q", 0), ("one", 2), ("!", 2), ("</s>", 2)]
    assert example.weights.tolist() == [1, 1, 0.5, 0.5, 0.5]


def test_a_token_of_both_counts(folder: Path) -> None:
    example = encode(folder, {"prompt": "an on", "response": "e"}, append_eos=False)
    assert tokens(folder, example) == [("a", 0), ("n", 0), (" ", 0), ("one", 2)]
    assert isinstance(example, Encoded) and example.notes == (NO_END,)
    example = encode(folder, {"q": "Q:", "a": " one"}, prompt_key="q", response_key="a", append_eos=False)
    assert tokens(folder, example) == [("Q", 0), (": ", 2), ("one", 2)]


def test_templates_and_bos(folder: Path) -> None:
    record = {"prompt": "{system}q", "response": "r{prompt}", "system": "S{prompt}"}
    example = encode(folder, record, prompt_template="{system}<|user|>{prompt}<|assistant|>", prepend_bos=True)
    assert tokens(folder, example) == [
        ("<s>", 0), *((letter, 0) for letter in "S{prompt}"), ("<|user|>", 0), *((letter, 0) for letter in "{system}q"),
        ("<|assistant|>", 0), *((letter, 2) for letter in "r{prompt}"), ("</s>", 2),
    ]  # fmt: skip
    once = encode(folder, {"prompt": "q", "response": "r"}, prompt_template="<s>{prompt}\n", prepend_bos=True)
    assert tokens(folder, once) == [("<s>", 0), ("q", 0), ("\n", 0), ("r", 2), ("</s>", 2)]
    assert InstructionSettings().fields == ("prompt", "response")


def test_bos_is_the_option_s_and_not_the_tokenizer_s(tmp_path: Path) -> None:
    folder = metaspace(tmp_path, ("\u2581q", "\u2581r"))
    record = {"prompt": "q", "response": " r"}
    without, with_bos = encode(folder, record), encode(folder, record, prepend_bos=True)
    assert isinstance(without, Encoded) and isinstance(with_bos, Encoded)
    pieces = load_tokenizer(folder).pieces()
    assert [pieces[i] for i in without.ids] == ["\u2581q", "\u2581r", "</s>"]
    # The tokenizer itself would add it.
    added = AutoTokenizer.from_pretrained(folder)("q r")["input_ids"]
    assert with_bos.ids.tolist()[:-1] == added and with_bos.mask is not None
    assert with_bos.mask.tolist() == [0, 0, 2, 2]


def test_through_a_chat_template(folder: Path) -> None:
    options = {"apply_chat_template": True, "template": TemplateSettings(template("chatml"))}
    example = encode(folder, {"prompt": "q", "response": "one", "system": "S"}, **options)
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "one"},
    ]
    own = AutoTokenizer.from_pretrained(folder)
    assert isinstance(example, Encoded)
    assert example.ids.tolist() == own.apply_chat_template(messages, chat_template=template("chatml"))["input_ids"]
    assert tokens(folder, example)[-4:] == [("\n", 0), ("one", 2), ("<|im_end|>", 2), ("\n", 0)]
    without = encode(folder, {"prompt": "q", "response": "one", "system": None}, **options)
    assert tokens(folder, without)[-4:] == tokens(folder, example)[-4:]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "q"}, "missing key: there is no 'response'"),
        ({"prompt": "q", "response": None}, "wrong type: 'response' is a null, not a string"),
        ({"prompt": 7, "response": "r"}, "wrong type: 'prompt' is a int, not a string"),
        ({"prompt": "q", "response": " \n"}, "empty response"),
        ({"prompt": "\ud800", "response": "r"}, "half a surrogate pair: 'prompt' has one, which is no text"),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_problems(folder: Path, record: dict[str, Any], expected: str, chat: bool) -> None:
    options = {"apply_chat_template": True, "template": TemplateSettings(template("chatml"))} if chat else {}
    assert str(encode(folder, record, **options)) == expected


def test_special_text_is_noted_and_the_template_s_is_not(folder: Path) -> None:
    noted = encode(folder, {"prompt": "what is <|user|>?", "response": "r"})
    assert isinstance(noted, Encoded) and noted.notes == (SPECIAL_TEXT,)
    plain = encode(folder, {"prompt": "q", "response": "r"}, prompt_template="<|user|>{prompt}")
    assert isinstance(plain, Encoded) and plain.notes == ()


def test_refusals(folder: Path, sentencepiece_file: Path) -> None:
    record = {"prompt": "q", "response": "r"}
    with pytest.raises(UserError, match="--prompt-template 'x' has no {prompt}"):
        encode(folder, record, prompt_template="x")
    with pytest.raises(UserError, match="cannot say which characters its tokens hold"):
        encode(sentencepiece_file, record)
