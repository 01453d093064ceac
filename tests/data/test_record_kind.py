"""Which settings the command line's options and the input's first record make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megakd.common.errors import UserError
from megakd.data.chat_encoder import ChatSettings, TemplateSettings
from megakd.data.instruction_encoder import InstructionSettings
from megakd.data.record_kind import RecordOptions, record_settings
from megakd.data.records import EncoderSettings
from megakd.data.text_encoder import TextSettings

SHAREGPT = [{"from": "human", "value": "red?"}, {"from": "gpt", "value": "blue."}]
ALPACA = InstructionSettings("instruction", "output", alpaca=True)


def settings_of(folder: Path, first: object, **options: Any) -> EncoderSettings:
    path = folder / "in.jsonl"
    path.write_text("broken\n" + json.dumps(first) + "\n")
    return record_settings(RecordOptions(**options), [str(path)])


@pytest.mark.parametrize(
    ("record", "options", "expected"),
    [
        ({"text": "a"}, {}, TextSettings()),
        ({"body": "a"}, {"text_key": "body", "append_eod": False}, TextSettings("body", append_eod=False)),
        ({"text": "a", "prompt": "b"}, {}, TextSettings()),
        ({"other": "a"}, {}, TextSettings()),
        ({"messages": []}, {}, ChatSettings()),
        ({"messages": [], "text": None}, {}, ChatSettings()),
        ({"chat": []}, {"messages_key": "chat", "tools_key": "t"}, ChatSettings("chat", "t")),
        ({"prompt": "a", "response": "b"}, {}, InstructionSettings()),
        (
            {"q": "a", "r": "b"},
            {"prompt_key": "q", "response_key": "r", "append_eod": False, "prepend_bos": True},
            InstructionSettings("q", "r", append_eos=False, prepend_bos=True),
        ),
        (
            {"prompt": "a", "response": "b"},
            {"apply_chat_template": True, "system_key": "s"},
            InstructionSettings(system_key="s", apply_chat_template=True),
        ),
        ({"text": "a", "messages": []}, {"record": "text"}, TextSettings()),
        ({"text": "a", "messages": []}, {"messages_key": "messages"}, ChatSettings()),
        ({"conversations": SHAREGPT}, {}, ChatSettings("conversations")),
        ({"conversation": SHAREGPT}, {}, ChatSettings("conversation")),
        ({"messages": SHAREGPT}, {}, ChatSettings("messages")),
        ({"conversations": [{"role": "user"}]}, {}, ChatSettings("conversations")),
        ({"conversations": SHAREGPT}, {"record": "sharegpt"}, ChatSettings("conversations")),
        ({"conversation": SHAREGPT}, {"record": "sharegpt"}, ChatSettings("conversation")),
        ({"conversations": SHAREGPT, "persona": ""}, {"system_key": "persona"},
         ChatSettings("conversations", system_key="persona")),
        ({"text": "a", "conversation": "a word"}, {}, TextSettings()),
        ({"instruction": "a", "input": "", "output": "b"}, {}, ALPACA),
        ({"instruction": "a", "output": "b"}, {"prompt_key": "instruction"}, ALPACA),
        ({"instruction": "a", "output": "b", "text": "c"}, {"record": "alpaca"}, ALPACA),
        ({"instruction": "a", "output": "b"}, {"record": "prompt", "prompt_key": "instruction",
         "response_key": "output"}, InstructionSettings("instruction", "output")),
        ({"prompt": "a", "completion": "b"}, {}, InstructionSettings("prompt", "completion")),
        ({"question": "a", "answer": "b"}, {}, InstructionSettings("question", "answer")),
        ({"query": "a", "response": "b"}, {}, InstructionSettings("query", "response")),
        ({"question": "a", "answer": "b", "text": "c"}, {}, TextSettings()),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"response_key": "chosen"},
         InstructionSettings("prompt", "chosen")),
    ],
)  # fmt: skip
def test_the_first_record_decides(tmp_path: Path, record: object, options: Any, expected: object) -> None:
    assert settings_of(tmp_path, record, **options) == expected


def test_a_template_is_read(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("größer")
    found = settings_of(tmp_path, {"messages": []}, chat_template=str(tmp_path / "chat.jinja"))
    assert found == ChatSettings(template=TemplateSettings("größer"))
    with pytest.raises(UserError, match="--chat-template /nowhere: cannot be read"):
        settings_of(tmp_path, {"messages": []}, chat_template="/nowhere")


@pytest.mark.parametrize(
    ("record", "options", "line"),
    [
        ({"text": "", "messages": []}, {}, "may be text .--record text. and conversations .--record messages.. Say"),
        ({"text": ""}, {"chat_template": "x"}, "--chat-template has no use for text. Leave it out."),
        ({"text": ""}, {"messages_key": "x"}, "--messages-key has no use for text. Leave it out, or give --record."),
        ({"messages": []}, {"prepend_bos": True}, "--prepend-bos has no use for conversations. The chat template"),
        ({"messages": []}, {"append_eod": False}, "--append-eod has no use for conversations. The chat template"),
        ({"prompt": "", "response": ""}, {"chat_template": "x"}, "with responses. Add --apply-chat-template."),
        (
            {"prompt": "", "response": ""},
            {"apply_chat_template": True, "prompt_template": "{prompt}"},
            "--prompt-template has no use for prompts through a chat template",
        ),
        (
            {"instruction": "a", "output": "b"},
            {"chat_template": "x"},
            "Alpaca instructions. Add --apply-chat-template.",
        ),
        ({"instruction": "a", "output": "b", "text": ""}, {}, "may be text .--record text. and Alpaca instructions"),
        ({"conversations": SHAREGPT}, {"text_key": "x"}, "--text-key has no use for ShareGPT conversations"),
        (
            {"messages": [], "conversations": []},
            {},
            "under 'messages' and 'conversations'. Say which with --messages-key",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {}, "preference data.*Use --response-key chosen to learn"),
        ({"chosen": SHAREGPT, "rejected": SHAREGPT}, {}, "in.jsonl:2: .*preference data.*Use --messages-key chosen"),
        ({"chosen": "b", "rejected": "c"}, {}, "preference data.*Use --text-key chosen"),
    ],
)
def test_refusals(tmp_path: Path, record: object, options: Any, line: str) -> None:
    with pytest.raises(UserError, match=line):
        settings_of(tmp_path, record, **options)


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (
            {"conversations": SHAREGPT},
            "the records are ShareGPT conversations ('conversations': from, value), read as messages "
            "(--record sharegpt)",
        ),
        (
            {"instruction": "a", "output": "b"},
            "the records are Alpaca instructions ('instruction', 'output'), read as prompts with responses "
            "(--record alpaca)",
        ),
        (
            {"question": "a", "answer": "b"},
            "the records are prompts with responses ('question', 'answer') (--record prompt)",
        ),
        (
            {"conversations": [{"role": "user"}]},
            "the records are conversations under 'conversations' (--record messages)",
        ),
        ({"text": "a", "loss_weight": 2}, "loss_weight: has no effect on text, of which every token is learnt"),
        ({"text": "a", "other": 2}, ""),
    ],
)
def test_what_is_recognised_is_said_in_one_line(
    tmp_path: Path, record: object, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings_of(tmp_path, record)
    assert capsys.readouterr().err == (f"{line}\n" if line else "")


def test_where_nothing_can_be_read_options_are_not_blamed(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text("[{")
    every: list[dict[str, Any]] = [
        {"messages_key": "chat"},
        {"tools_key": "t"},
        {"chat_template": str(tmp_path / "in.json")},
    ]
    for options in every:
        assert isinstance(record_settings(RecordOptions(**options), [str(tmp_path)]), ChatSettings)
    found = record_settings(RecordOptions(prompt_key="q", apply_chat_template=True), [str(tmp_path)])
    assert found == InstructionSettings("q", apply_chat_template=True)


def test_a_record_that_is_nothing_does_not_decide(tmp_path: Path) -> None:
    records = [{"input": "x"}, {"messages": None}, {"conversations": SHAREGPT}, {"text": "a"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert record_settings(RecordOptions(), [str(tmp_path)]) == ChatSettings("conversations")
