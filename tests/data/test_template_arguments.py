"""Template variables and tools: from the command line, from files and from records; ids as transformers has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megakd.common.errors import UserError
from megakd.data.chat_encoder import ChatSettings, TemplateSettings
from megakd.data.records import LEFT_OUT, UNREAD_VARIABLE, Encoded, Problem
from megakd.data.template_arguments import parse_arguments, read_tools
from megakd.data.tokenizer import load_tokenizer
from tests.data.chat_tokenizers import byte_level

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for d in documents or [] %}{{ d.text }}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.thinking and enable_thinking is not false %}<think>{{ m.thinking }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>{% endfor %}{% if reasoning_effort %}{{ reasoning_effort }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "hm"}]
TOOLS = [{"type": "function", "function": {"name": "add"}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(tmp_path_factory.mktemp("arguments"))


def encode(folder: Path, record: dict[str, Any], **settings: Any) -> Encoded | Problem:
    chat = ChatSettings(template=TemplateSettings(TEMPLATE, **settings))
    [found] = chat.build(load_tokenizer(folder)).encode([{"messages": MESSAGES, **record}])
    return found


def text_of(folder: Path, found: Encoded | Problem) -> str:
    assert isinstance(found, Encoded), found
    return load_tokenizer(folder).decode(found.ids.tolist())


@pytest.mark.parametrize(
    ("arguments", "own"),
    [
        ({}, {}),
        ({"enable_thinking": False}, {}),
        ({"enable_thinking": False}, {"enable_thinking": True, "reasoning_effort": "low"}),
        ({"documents": [{"title": "t", "text": "D"}]}, {}),
        ({}, {"documents": [{"title": "t", "text": "D"}], "enable_thinking": False}),
    ],
)
def test_ids_are_those_of_transformers(folder: Path, arguments: dict[str, Any], own: dict[str, Any]) -> None:
    found = encode(folder, {"chat_template_kwargs": own}, arguments=arguments)
    reference = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        MESSAGES, chat_template=TEMPLATE, **{**arguments, **own}
    )
    assert isinstance(found, Encoded) and found.ids.tolist() == reference["input_ids"]
    thinks = {**arguments, **own}.get("enable_thinking", True)
    assert found.mask is not None
    learned = load_tokenizer(folder).decode(found.ids[found.mask > 0].tolist())
    assert learned == ("<think>hm</think>" if thinks else "") + "a<|im_end|>"
    assert (LEFT_OUT in found.notes) == (not thinks)


def test_tools_of_records_and_of_all(folder: Path) -> None:
    others = [{"type": "function", "function": {"name": "other"}}]
    assert text_of(folder, encode(folder, {"tools": TOOLS}, tools=others)).startswith(json.dumps(TOOLS))
    assert text_of(folder, encode(folder, {"tools": json.dumps(TOOLS)}, tools=others)).startswith(json.dumps(TOOLS))
    for none in ({}, {"tools": None}, {"tools": ""}):
        assert text_of(folder, encode(folder, none, tools=others)).startswith(json.dumps(others))
        assert text_of(folder, encode(folder, none)).startswith("<|im_start|>user")
    assert str(encode(folder, {"tools": "[{"})).startswith("tools are no list: 'tools' is a text that is no JSON")


def test_variables_of_records_that_are_none(folder: Path) -> None:
    assert str(encode(folder, {"chat_template_kwargs": "x"})) == (
        "wrong template variables: 'chat_template_kwargs' is a str, not an object"
    )
    assert "'chat_template_kwargs' has 'tools'" in str(encode(folder, {"chat_template_kwargs": {"tools": []}}))
    found = encode(folder, {"chat_template_kwargs": {"enable_thinknig": False, "other": None}})
    assert isinstance(found, Encoded) and found.notes == (UNREAD_VARIABLE,)


def test_the_command_line_s_values_are_yaml_s() -> None:
    given = [
        "enable_thinking=false",
        "n=3",
        "effort=low",
        "text='3'",
        "list=[1, a]",
        "empty=",
        "when=2026-01-02",
        "eq=a=b",
    ]
    assert parse_arguments(given) == {
        "enable_thinking": False, "n": 3, "effort": "low", "text": "3", "list": [1, "a"], "empty": None,
        "when": "2026-01-02", "eq": "a=b",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["enable_thinking"], "must be name=value"),
        (["=x"], "must be name=value"),
        (["a=1", "a=2"], "given twice"),
        (["messages=[]"], "from the record or the tokenizer"),
        (["add_generation_prompt=true"], "from the record or the tokenizer"),
        (["a={"], "the value is no YAML"),
    ],
)
def test_wrong_arguments(given: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        parse_arguments(given)


def test_an_argument_that_the_template_does_not_read_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"enable_thinknig has no effect.*documents, enable_thinking, reasoning_effort"):
        encode(folder, {}, arguments={"enable_thinknig": False})


def test_files_of_tools(tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text(json.dumps(TOOLS))
    assert read_tools(str(path)) == TOOLS
    for text in ("{}", "[", '"x"'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"--tools .*tools.json: .* Give a JSON file with a list of tools"):
            read_tools(str(path))
    with pytest.raises(UserError, match="--tools /nowhere: cannot be read"):
        read_tools("/nowhere")
