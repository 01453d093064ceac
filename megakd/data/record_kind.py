"""What the records of the input are: text, conversations, or prompts with responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from megakd.common.errors import UserError
from megakd.data.chat_encoder import ChatSettings, TemplateSettings
from megakd.data.file_contents import Format
from megakd.data.instruction_encoder import PROMPT, InstructionSettings
from megakd.data.progress import note
from megakd.data.records import EncoderSettings, Record
from megakd.data.sources import Position, file_sources
from megakd.data.template_arguments import parse_arguments, read_tools
from megakd.data.text_encoder import TextSettings

Kind = Literal["text", "messages", "prompt"]
LOOKED_AT = 1000  # records, where the first ones cannot be used
WHAT = {"text": "text", "messages": "conversations", "prompt": "prompts with responses"}


@dataclass(frozen=True)
class RecordOptions:
    """The command line's options about records; None where one was not given."""

    record: Kind | None = None
    text_key: str | None = None
    messages_key: str | None = None
    tools_key: str | None = None
    prompt_key: str | None = None
    response_key: str | None = None
    system_key: str | None = None
    prompt_template: str | None = None
    apply_chat_template: bool | None = None
    chat_template: str | None = None
    template_argument: list[str] | None = None
    tools: str | None = None
    append_eod: bool | None = None
    prepend_bos: bool | None = None


# What each option is for; "chat" is a prompt that goes through a chat template.
USES: dict[str, set[str]] = {
    "text_key": {"text"},
    "messages_key": {"messages"},
    "tools_key": {"messages"},
    "prompt_key": {"prompt", "chat"},
    "response_key": {"prompt", "chat"},
    "system_key": {"prompt", "chat"},
    "prompt_template": {"prompt"},
    "apply_chat_template": {"chat"},
    "chat_template": {"messages", "chat"},
    "template_argument": {"messages", "chat"},
    "tools": {"messages", "chat"},
    "append_eod": {"text", "prompt"},
    "prepend_bos": {"text", "prompt"},
}


def record_settings(options: RecordOptions, inputs: Sequence[str], format: Format = "auto") -> EncoderSettings:
    """The encoder's settings for the options, and where `record` is None for what the first record is.

    Raises UserError where a record may be several things, or an option has no use for these records.
    """
    kind = options.record
    if kind is None:
        kind = _kind_of_first(options, inputs, format)
        if kind != "text":
            note(f"the records are {WHAT[kind]} (--record {kind})")
    use = "chat" if kind == "prompt" and options.apply_chat_template else kind
    for name, uses in USES.items():
        if getattr(options, name) not in (None, False) and use not in uses:
            raise _no_use(name, use)
    if options.append_eod is False and use not in USES["append_eod"]:
        raise _no_use("append_eod", use)
    append, prepend = options.append_eod is not False, bool(options.prepend_bos)
    if kind == "text":
        return TextSettings(options.text_key or "text", append_eod=append, prepend_bos=prepend)
    template = TemplateSettings(
        None if options.chat_template is None else _read(options.chat_template),
        parse_arguments(options.template_argument or ()),
        None if options.tools is None else read_tools(options.tools),
    )
    if kind == "messages":
        return ChatSettings(options.messages_key or "messages", options.tools_key or "tools", template)
    return InstructionSettings(
        options.prompt_key or "prompt",
        options.response_key or "response",
        options.system_key or "system",
        prompt_template=PROMPT if options.prompt_template is None else options.prompt_template,
        append_eos=append,
        prepend_bos=prepend,
        apply_chat_template=use == "chat",
        template=template,
    )


def _kind_of_first(options: RecordOptions, inputs: Sequence[str], format: Format) -> Kind:
    keys: dict[Kind, tuple[str, ...]] = {
        "text": (options.text_key or "text",),
        "messages": (options.messages_key or "messages",),
        "prompt": (options.prompt_key or "prompt", options.response_key or "response"),
    }
    found = _first_record([key for group in keys.values() for key in group], inputs, format)
    if found is None:
        return "text"  # whose messages say what is wrong
    place, record = found
    kinds = [kind for kind, group in keys.items() if all(record.get(key) is not None for key in group)]
    if len(kinds) > 1:
        several = " and ".join(f"{WHAT[kind]} (--record {kind})" for kind in kinds)
        raise UserError(f"{place}: the record may be {several}. Say which.")
    return kinds[0] if kinds else "text"


def _first_record(fields: Sequence[str], inputs: Sequence[str], format: Format) -> tuple[str, Record] | None:
    for source in file_sources(inputs, format):
        for line, value in islice(source.read(fields, Position()), LOOKED_AT):
            if isinstance(value, dict):
                return f"{source.name}:{line}", value
    return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--chat-template {path}: cannot be read ({error.strerror}). Give a jinja file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--chat-template {path}: not UTF-8 text. Give a jinja file.") from error


def _no_use(name: str, use: str) -> UserError:
    what = {**WHAT, "chat": "prompts through a chat template"}[use]
    remedies = {
        "append_eod": "The chat template ends turns; leave it out.",
        "prepend_bos": "The chat template writes bos; leave it out.",
        **dict.fromkeys(
            ("chat_template", "template_argument", "tools"),
            "Add --apply-chat-template." if use == "prompt" else "Leave it out.",
        ),
    }
    option = "--append-eod" if name == "append_eod" else f"--{name.replace('_', '-')}"
    return UserError(f"{option} has no use for {what}. {remedies.get(name, 'Leave it out, or give --record.')}")
