"""ShareGPT and Alpaca records become the messages and prompts that one would write by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megakd.data.chat_encoder import ChatSettings, TemplateSettings
from megakd.data.instruction_encoder import InstructionSettings
from megakd.data.record_formats import as_conversation
from megakd.data.records import Encoded, EncoderSettings, Problem
from megakd.data.tokenizer import load_tokenizer
from tests.data.chat_tokenizers import byte_level, template

CHATML = TemplateSettings(template("chatml"))
CALL = {"name": "get", "arguments": {"city": "Łódź"}}
TOOL_CALL = {"type": "function", "function": CALL}


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(tmp_path_factory.mktemp("formats"))


def encode(folder: Path, settings: EncoderSettings, record: dict[str, Any]) -> Encoded | Problem:
    [result] = settings.build(load_tokenizer(folder)).encode([record])
    return result


def ids_of(folder: Path, messages: list[dict[str, Any]], tools: Any = None) -> list[int]:
    """The ids that transformers gives for messages."""
    found: Any = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, tools=tools, chat_template=CHATML.text
    )
    ids: list[int] = found["input_ids"]
    return ids


def turns(*pairs: tuple[str, object]) -> list[dict[str, Any]]:
    return [{"from": sender, "value": value} for sender, value in pairs]


def messages(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


USER, ANSWER = ("user", "red?"), ("assistant", "blue.")
ASKED, ANSWERED = ("human", "red?"), ("gpt", "blue.")
CALLED = {"role": "assistant", "content": "", "tool_calls": [TOOL_CALL]}
REST = messages(("tool", "rain"), ANSWER)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"chat": turns(ASKED, ANSWERED)}, messages(USER, ANSWER)),
        ({"chat": turns(("user", "red?"), ("assistant", "blue."))}, messages(USER, ANSWER)),
        ({"chat": turns(ASKED, ("bard", "blue."), ASKED, ("chatgpt", "x"), ASKED, ("bing", "y"))},
         messages(USER, ANSWER, USER, ("assistant", "x"), USER, ("assistant", "y"))),
        ({"chat": turns(("system", "S"), ASKED, ANSWERED)}, messages(("system", "S"), USER, ANSWER)),
        ({"chat": turns(ASKED, ANSWERED), "system": "S"}, messages(("system", "S"), USER, ANSWER)),
        ({"chat": turns(("system", "S"), ASKED, ANSWERED), "system": "S"}, messages(("system", "S"), USER, ANSWER)),
        ({"chat": turns(ASKED, ANSWERED), "system": ""}, messages(USER, ANSWER)),
        ({"chat": turns(ASKED, ANSWERED), "system": None}, messages(USER, ANSWER)),
        ({"chat": messages(USER, ANSWER), "system": "S"}, messages(("system", "S"), USER, ANSWER)),
        ({"chat": [*messages(USER), *turns(ANSWERED)]}, messages(USER, ANSWER)),
        ({"chat": turns(ASKED, ("function_call", json.dumps(CALL)), ("observation", "rain"), ANSWERED)},
         [*messages(USER), CALLED, *REST]),
        ({"chat": turns(ASKED, ("function_call", CALL), ("tool", "rain"), ANSWERED)}, [*messages(USER), CALLED, *REST]),
        ({"chat": turns(ASKED, ("function_call", json.dumps([CALL, CALL])), ("function_response", "rain"), ANSWERED)},
         [*messages(USER), {**CALLED, "tool_calls": [TOOL_CALL, TOOL_CALL]}, *REST]),
        ({"chat": turns(ASKED, ("function_call", json.dumps({"name": "get", "arguments": '{"city": "Łódź"}'})),
                        ("observation", "rain"), ANSWERED)}, [*messages(USER), CALLED, *REST]),
        ({"chat": turns(ASKED, ("function_call", '{"name": "get"}'), ("observation", "rain"), ANSWERED)},
         [*messages(USER), {**CALLED, "tool_calls": [{"function": {"name": "get", "arguments": {}}}]}, *REST]),
        ({"chat": turns(ASKED, ANSWERED), "tools": [TOOL_CALL]}, messages(USER, ANSWER)),
    ],
)  # fmt: skip
def test_sharegpt_is_rendered_as_the_messages_are(
    letters: Path, record: dict[str, Any], expected: list[dict[str, Any]]
) -> None:
    found = encode(letters, ChatSettings("chat", template=CHATML), record)
    assert isinstance(found, Encoded) and found.mask is not None
    assert found.ids.tolist() == ids_of(letters, expected, record.get("tools"))
    tokenizer = load_tokenizer(letters)
    answer = expected[-1]["content"] + "<|im_end|>"
    assert tokenizer.decode(found.ids[found.mask == 2].tolist()) == answer


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"chat": turns(ASKED, ("narrator", "x"))},
            "unknown role: 'chat[1]' is from 'narrator'; known are human, user,",
        ),
        ({"chat": turns(ASKED, (None, "x"))}, "unknown role: 'chat[1]' is from None"),  # type: ignore[arg-type]
        ({"chat": [{"from": "gpt"}]}, "message without a value: 'chat[0]' has no 'value'"),
        ({"chat": turns(("human", None), ANSWERED)}, "message without a value: 'chat[0]' has no 'value'"),
        ({"chat": turns(ASKED, ("gpt", 5))}, "unknown content: 'chat[1]' has a int as content"),
        (
            {"chat": turns(ASKED, ("function_call", "get(city)"))},
            "function call that is none: 'chat[1]' is not JSON such",
        ),
        ({"chat": turns(ASKED, ("function_call", '{"name": "f", "arguments": 5}'))}, "function call that is none"),
        ({"chat": turns(ASKED, ("function_call", "[]"))}, "function call that is none: 'chat[1]' is an empty list"),
        ({"chat": turns(ASKED)}, "no assistant message"),
        (
            {"chat": turns(("system", "S"), ASKED, ANSWERED), "system": "T"},
            "two system texts: 'system' says another than",
        ),
        ({"chat": turns(ASKED, ANSWERED), "system": 5}, "wrong type: 'system' is a int"),
        ({"chat": "red?"}, "not a list of messages: 'chat' is a str"),
        ({"text": "red?"}, "missing key: there is no 'chat'"),
    ],
)
def test_what_cannot_be_converted_is_a_problem(letters: Path, record: dict[str, Any], expected: str) -> None:
    assert str(encode(letters, ChatSettings("chat", template=CHATML), record)).startswith(expected)


def test_other_keys_of_a_message_stay() -> None:
    flags = {"weight": 0, "train": False, "loss_mask": [1], "name": "x"}
    record = {"chat": [{"from": "gpt", "value": "a", **flags}, {"from": "function_call", "value": CALL, "loss": True}]}
    found = as_conversation({**record, "trainable": 1}, "chat", "system")
    assert isinstance(found, dict) and found["trainable"] == 1
    assert found["chat"] == [{"role": "assistant", "content": "a", **flags}, {**CALLED, "loss": True}]


ALPACA = InstructionSettings("instruction", "output", alpaca=True)
CHAT = InstructionSettings("instruction", "output", alpaca=True, apply_chat_template=True, template=CHATML)


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"instruction": "Add", "input": "1 2", "output": "3"}, "Add\n1 2"),
        ({"instruction": "Add", "input": "", "output": "3"}, "Add"),
        ({"instruction": "Add", "input": None, "output": "3"}, "Add"),
        ({"instruction": "Add", "output": "3", "history": []}, "Add"),
        ({"instruction": "", "input": "1 2", "output": "3", "system": ""}, "1 2"),
    ],
)
def test_alpaca_s_input_follows_the_instruction(letters: Path, record: dict[str, Any], prompt: str) -> None:
    assert set(ALPACA.fields) == {"instruction", "output", "input", "history", "system"}
    plain = encode(letters, InstructionSettings(), {"prompt": prompt, "response": "3"})
    found = encode(letters, ALPACA, record)
    assert isinstance(plain, Encoded) and isinstance(found, Encoded)
    assert found.mask is not None and plain.mask is not None
    assert (found.ids.tolist(), found.mask.tolist()) == (plain.ids.tolist(), plain.mask.tolist())
    through = encode(letters, CHAT, record)
    assert isinstance(through, Encoded)
    assert through.ids.tolist() == ids_of(letters, messages(("user", prompt), ("assistant", "3")))


def test_alpaca_s_history_becomes_earlier_turns(letters: Path) -> None:
    record = {"instruction": "q", "input": "x", "output": "a", "system": "S", "history": [["one?", "1"], ["two?", "2"]]}
    found = encode(letters, CHAT, record)
    expected = messages(
        ("system", "S"), ("user", "one?"), ("assistant", "1"), ("user", "two?"), ("assistant", "2"), ("user", "q\nx"),
        ("assistant", "a"),
    )  # fmt: skip
    assert isinstance(found, Encoded) and found.mask is not None
    assert found.ids.tolist() == ids_of(letters, expected)
    tokenizer = load_tokenizer(letters)
    assert [tokenizer.decode(found.ids[found.mask == which].tolist()) for which in (1, 2)] == [
        "1<|im_end|>2<|im_end|>",
        "a<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("settings", "more", "expected"),
    [
        (ALPACA, {"history": [["one?", "1"]]}, "earlier turns without a chat template: 'history' has 1"),
        (ALPACA, {"system": "S"}, "system text without a place: --prompt-template has no {system}"),
        (ALPACA, {"input": 5}, "wrong type: 'input' is a int, not a string"),
        (ALPACA, {"history": "x"}, "history that is no list of turns: 'history' is a str; write"),
        (CHAT, {"history": [["one?"]]}, "history that is no list of turns: 'history[0]' is not [prompt, response]"),
        (CHAT, {"history": [["one?", None]]}, "wrong type: 'history[0][1]' is a null"),
        (CHAT, {"output": ""}, "empty response"),
    ],
)
def test_what_alpaca_s_records_say_is_never_dropped(
    letters: Path, settings: InstructionSettings, more: dict[str, Any], expected: str
) -> None:
    assert str(encode(letters, settings, {"instruction": "q", "output": "a", **more})).startswith(expected)


def test_a_template_has_a_place_for_alpaca_s_system_text(letters: Path) -> None:
    settings = InstructionSettings("instruction", "output", alpaca=True, prompt_template="{system}: {prompt}")
    found = encode(letters, settings, {"instruction": "q", "input": "x", "output": "a", "system": "S"})
    assert isinstance(found, Encoded)
    assert load_tokenizer(letters).decode(found.ids.tolist()) == "S: q\nxa</s>"
