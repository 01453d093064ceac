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
    ],
)
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
    ],
)
def test_refusals(tmp_path: Path, record: object, options: Any, line: str) -> None:
    with pytest.raises(UserError, match=line):
        settings_of(tmp_path, record, **options)
