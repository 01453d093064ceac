"""What the records of the input are: text, conversations, or prompts with responses, in which of their formats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from megakd.common.errors import UserError
from megakd.data.chat_encoder import ChatSettings, TemplateSettings
from megakd.data.file_contents import Format
from megakd.data.instruction_encoder import PROMPT, InstructionSettings
from megakd.data.progress import note
from megakd.data.record_formats import CONVERSATION_KEYS, HISTORY, INPUT, is_sharegpt
from megakd.data.records import EncoderSettings, Record, looks_like_flag
from megakd.data.sources import Position, file_sources
from megakd.data.template_arguments import parse_arguments, read_tools
from megakd.data.text_encoder import TextSettings

Kind = Literal["text", "messages", "sharegpt", "prompt", "alpaca"]
LOOKED_AT = 1000  # records, where the first ones cannot be used
WHAT: dict[str, str] = {
    "text": "text",
    "messages": "conversations",
    "sharegpt": "ShareGPT conversations",
    "prompt": "prompts with responses",
    "alpaca": "Alpaca instructions",
    "chat": "prompts through a chat template",
}
# The keys of prompts with their responses: ours, TRL's, and two that many data sets have.
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("query", "response"), ("question", "answer"))
ALPACA = ("instruction", "output")
PREFERENCES = ("chosen", "rejected")


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
    "messages_key": {"messages", "sharegpt"},
    "tools_key": {"messages", "sharegpt"},
    "prompt_key": {"prompt", "alpaca", "chat"},
    "response_key": {"prompt", "alpaca", "chat"},
    "system_key": {"messages", "sharegpt", "prompt", "alpaca", "chat"},
    "prompt_template": {"prompt", "alpaca"},
    "apply_chat_template": {"chat"},
    "chat_template": {"messages", "sharegpt", "chat"},
    "template_argument": {"messages", "sharegpt", "chat"},
    "tools": {"messages", "sharegpt", "chat"},
    "append_eod": {"text", "prompt", "alpaca"},
    "prepend_bos": {"text", "prompt", "alpaca"},
}


class _First(NamedTuple):
    """A record that can be read, and where it is."""

    place: str
    record: Record


class _Keys(NamedTuple):
    """Under which keys records of a kind have what is read; empty where the kind does not read it."""

    kind: Kind
    messages: str = ""
    prompt: str = ""
    response: str = ""


def record_settings(options: RecordOptions, inputs: Sequence[str], format: Format = "auto") -> EncoderSettings:
    """The encoder's settings for the options, and where `record` is None for what the first record is.

    Raises UserError where a record may be several things, or an option has no use for these records.
    """
    keys = _keys_of_kind(options, inputs, format) if options.record else _keys_of_first(options, inputs, format)
    kind = keys.kind
    use = _use(kind, options)
    wrong = next(_misused(options, kind), None)
    if wrong is not None:
        raise _no_use(wrong, use)
    append, prepend = options.append_eod is not False, bool(options.prepend_bos)
    if kind == "text":
        return TextSettings(options.text_key or "text", append_eod=append, prepend_bos=prepend)
    template = TemplateSettings(
        None if options.chat_template is None else _read(options.chat_template),
        parse_arguments(options.template_argument or ()),
        None if options.tools is None else read_tools(options.tools),
    )
    system_key = options.system_key or "system"
    if kind in ("messages", "sharegpt"):
        return ChatSettings(keys.messages, options.tools_key or "tools", template, system_key)
    return InstructionSettings(
        keys.prompt,
        keys.response,
        system_key,
        prompt_template=PROMPT if options.prompt_template is None else options.prompt_template,
        append_eos=append,
        prepend_bos=prepend,
        apply_chat_template=use == "chat",
        template=template,
        alpaca=kind == "alpaca",
    )


def _use(kind: Kind, options: RecordOptions) -> str:
    return "chat" if kind in ("prompt", "alpaca") and options.apply_chat_template else kind


def _misused(options: RecordOptions, kind: Kind) -> Iterator[str]:
    """The options given that have no use for records of a kind."""
    use = _use(kind, options)
    given = {name for name in USES if getattr(options, name) not in (None, False)}
    if options.append_eod is False:
        given.add("append_eod")
    yield from (name for name in USES if name in given and use not in USES[name])


def _default_keys(kind: Kind, options: RecordOptions) -> _Keys:
    if kind == "text":
        return _Keys(kind)
    if kind in ("messages", "sharegpt"):
        return _Keys(kind, messages=options.messages_key or ("conversations" if kind == "sharegpt" else "messages"))
    prompt, response = ALPACA if kind == "alpaca" else PAIRS[0]
    return _Keys(kind, prompt=options.prompt_key or prompt, response=options.response_key or response)


def _keys_of_kind(options: RecordOptions, inputs: Sequence[str], format: Format) -> _Keys:
    """The keys of records whose kind is given; ShareGPT's has several names for one of them."""
    assert options.record is not None
    keys = _default_keys(options.record, options)
    if options.record != "sharegpt" or options.messages_key is not None:
        return keys
    found = next(_records(CONVERSATION_KEYS, inputs, format), None)
    lists = [] if found is None else [key for key in CONVERSATION_KEYS if is_sharegpt(found.record.get(key))]
    return keys._replace(messages=lists[0]) if lists else keys


def _keys_of_first(options: RecordOptions, inputs: Sequence[str], format: Format) -> _Keys:
    """What the first record is, which a line on standard error says unless it is text."""
    given = (options.text_key, options.messages_key, options.prompt_key, options.response_key)
    looked = (
        "text",
        *CONVERSATION_KEYS,
        *(key for pair in PAIRS for key in pair),
        *ALPACA,
        INPUT,
        HISTORY,
        *PREFERENCES,
    )
    fields = [*(key for key in given if key is not None), *looked]
    if options.text_key is None:
        fields.insert(0, "text")  # a file of text is a record of the first field
    for found in _records(list(dict.fromkeys(fields)), inputs, format):
        fits = [*_fits(found, options)]
        if fits:
            keys = _chosen(found, fits, options)
            if keys.kind != "text":
                note(f"the records are {_said(keys)}")
            elif flags := [key for key in found.record if looks_like_flag(key) and key not in fields]:
                note(f"{', '.join(flags)}: has no effect on text, of which every token is learnt")
            return keys
        if all(found.record.get(key) is not None for key in PREFERENCES):
            raise _preferences(found)
    # Text's messages say what is wrong, unless options say that it should be something else.
    kinds: tuple[Kind, ...] = ("text", "messages", "prompt")
    return _default_keys(next((kind for kind in kinds if not any(_misused(options, kind))), "text"), options)


def _chosen(found: _First, fits: list[_Keys], options: RecordOptions) -> _Keys:
    """The one of several that an option which names a key has chosen."""
    fits = [keys for keys in fits if _is_named(keys, options)] or fits
    if len(fits) > 1:
        several = " and ".join(f"{WHAT[keys.kind]} (--record {keys.kind})" for keys in fits)
        raise UserError(f"{found.place}: the record may be {several}. Say which.")
    return fits[0]


def _is_named(keys: _Keys, options: RecordOptions) -> bool:
    if keys.kind == "text":
        return options.text_key is not None
    if keys.messages:
        return options.messages_key is not None
    return options.prompt_key is not None or options.response_key is not None


def _fits(found: _First, options: RecordOptions) -> Iterator[_Keys]:
    """What the record may be."""
    record, count = found.record, 0

    def has(*keys: str) -> bool:
        return all(record.get(key) is not None for key in keys)

    if has(options.text_key or "text"):
        count += 1
        yield _Keys("text")
    names = CONVERSATION_KEYS if options.messages_key is None else (options.messages_key,)
    # What is not called as ours may be a text of that name.
    lists = [key for key in names if has(key) and (key == names[0] or isinstance(record[key], list))]
    if len(lists) > 1:
        raise UserError(
            f"{found.place}: the record has conversations under '{lists[0]}' and '{lists[1]}'. Say which with "
            f"--messages-key {lists[0]}."
        )
    for key in lists:
        count += 1
        yield _Keys("sharegpt" if is_sharegpt(record[key]) else "messages", messages=key)
    prompt, response = options.prompt_key or ALPACA[0], options.response_key or ALPACA[1]
    if prompt == ALPACA[0] and has(prompt, response):
        yield _Keys("alpaca", prompt=prompt, response=response)
        return
    for pair in PAIRS:
        prompt, response = options.prompt_key or pair[0], options.response_key or pair[1]
        # Other names than ours say so only where nothing else does.
        if has(prompt, response) and (not count or pair == PAIRS[0]):
            yield _Keys("prompt", prompt=prompt, response=response)
            return


def _said(keys: _Keys) -> str:
    what, option = WHAT[keys.kind], f"(--record {keys.kind})"
    if keys.kind == "sharegpt":
        return f"{what} ('{keys.messages}': from, value), read as messages {option}"
    if keys.kind == "alpaca":
        return f"{what} ('{keys.prompt}', '{keys.response}'), read as prompts with responses {option}"
    if keys.kind == "messages" and keys.messages != CONVERSATION_KEYS[0]:
        return f"{what} under '{keys.messages}' {option}"
    if keys.kind == "prompt" and (keys.prompt, keys.response) != PAIRS[0]:
        return f"{what} ('{keys.prompt}', '{keys.response}') {option}"
    return f"{what} {option}"


def _preferences(found: _First) -> UserError:
    chosen = found.record[PREFERENCES[0]]
    if isinstance(chosen, list):
        remedy = "Use --messages-key chosen"
    elif found.record.get("prompt") is not None:
        remedy = "Use --response-key chosen"
    else:
        remedy = "Use --text-key chosen"
    return UserError(
        f"{found.place}: the record is preference data ('chosen' and 'rejected'), and one text is learnt here. "
        f"{remedy} to learn the chosen one."
    )


def _records(fields: Sequence[str], inputs: Sequence[str], format: Format) -> Iterator[_First]:
    """The first records of each file."""
    for source in file_sources(inputs, format):
        for line, value in islice(source.read(fields, Position(), True), LOOKED_AT):
            if isinstance(value, dict):
                yield _First(f"{source.name}:{line}", value)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--chat-template {path}: cannot be read ({error.strerror}). Give a jinja file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--chat-template {path}: not UTF-8 text. Give a jinja file.") from error


def _no_use(name: str, use: str) -> UserError:
    remedies = {
        "append_eod": "The chat template ends turns; leave it out.",
        "prepend_bos": "The chat template writes bos; leave it out.",
        **dict.fromkeys(
            ("chat_template", "template_argument", "tools"),
            "Add --apply-chat-template." if use in ("prompt", "alpaca") else "Leave it out.",
        ),
    }
    option = "--append-eod" if name == "append_eod" else f"--{name.replace('_', '-')}"
    return UserError(f"{option} has no use for {WHAT[use]}. {remedies.get(name, 'Leave it out, or give --record.')}")
