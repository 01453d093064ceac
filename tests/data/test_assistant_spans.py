"""Spans of the assistant: what it said with the end of each turn, or a refusal; never anything else."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

from megakd.data.chat_encoder import ChatEncoder, ChatSettings, TemplateSettings
from megakd.data.chat_template import ChatTemplate
from megakd.data.records import NO_END, Encoded, Problem
from megakd.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.chat_tokenizers import byte_level
from tests.data.span_templates import ASKED, CALLS, TEMPLATES, Template

Messages = list[dict[str, Any]]
MARKS = (
    "<|turn|>", "<|body|>", "<|/body|>", "<|end|>", "<|call|>", "<|/call|>", "<|result|>", "<|/result|>", "<|system|>",
    "<|tool|>", "<think>", "</think>",
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Tokenizers of bytes, with the templates' marks as special tokens and without."""
    plain = byte_level(tmp_path_factory.mktemp("plain"), special=("<s>", "</s>"))
    own = AutoTokenizer.from_pretrained(plain)
    own.add_special_tokens({"additional_special_tokens": [AddedToken(mark, normalized=False) for mark in MARKS]})
    marked = tmp_path_factory.mktemp("marked")
    own.save_pretrained(marked)
    return {True: marked, False: plain}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(number: int, name: str = "add", **arguments: Any) -> dict[str, Any]:
    return {"id": f"call{number:05}", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(number: int, text: str, name: str = "add") -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": f"call{number:05}", "name": name}


def spans_of(tokenizer: Tokenizer, example: Encoded) -> list[str]:
    """Runs of tokens that are learned; two turns never touch."""
    assert example.mask is not None
    pairs = zip(example.ids.tolist(), (example.mask > 0).tolist(), strict=True)
    runs = [(learned, [i for i, _ in group]) for learned, group in groupby(pairs, lambda pair: pair[1])]
    return [tokenizer.decode(ids) for learned, ids in runs if learned]


def encode(folder: Path, text: str, messages: Messages) -> list[str] | Problem:
    tokenizer = load_tokenizer(folder)
    [found] = ChatSettings(template=TemplateSettings(text)).build(tokenizer).encode([{"messages": messages}])
    return spans_of(tokenizer, found) if isinstance(found, Encoded) else found


BODY = "{% for m in messages %}<|turn|>{{ m.role }}<|body|>{{ m.content }}<|end|>{% endfor %}"
ONE = [user("red?"), assistant("blue.")]
TWO = [user("red?"), assistant("blue."), assistant("green.")]
CALLED = [user("sum?"), assistant(None, tool_calls=[call(1, a=1)]), result(1, "three"), assistant("It is three.")]
CALL_END = '<|call|>add {"a": 1}<|/call|><|end|>'


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("text", "messages", "expected"),
    [
        # Characters of a mark that others begin or end with too.
        (
            "{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ m.content }}<|end|>\n<|assistant|>\n"
            "{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}",
            ONE, ["blue.<|end|>"],
        ),
        (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endofturn|>{% endfor %}<|endof|>",
            ONE, ["blue.<|endofturn|>"],
        ),
        (
            "{% for m in messages %}[{{ m.role | upper }}]{{ m.content }}[END]{% endfor %}",
            [user("red?"), assistant("blue."), user("E"), assistant("END")], ["blue.[END]", "END[END]"],
        ),
        (
            "{% for m in messages %}<|{{ m.role[0] }}|>{{ m.content }}<|e|>{% endfor %}<|a|>",
            [*ONE, *ONE], ["blue.<|e|>", "blue.<|e|>"],
        ),
        # A header that nobody asked for.
        (BODY + "<|turn|>assistant{% if add_generation_prompt %}<|body|>{% endif %}", ONE, ["blue.<|end|>"]),
        (BODY + "<|turn|>assistant<|body|>", TWO, ["blue.<|end|>", "green.<|end|>"]),
        (
            "{% for m in messages %}<|turn|>{{ m.role }}<|body|>{% if m.tool_calls %}" + CALLS + "{% else %}"
            "{{ m.content }}{% endif %}<|end|>{% endfor %}<|turn|>assistant<|body|>",
            CALLED, [CALL_END, "It is three.<|end|>"],
        ),
        (
            "{% for m in messages %}<|turn|>{{ m.role }}<|body|>{{ m.content or '' }}" + CALLS + "<|end|>{% endfor %}"
            "<|turn|>assistant{% if add_generation_prompt %}<|body|>{% endif %}",
            CALLED[:2], [CALL_END],
        ),
        # What follows the last turn.
        (
            BODY + "<|turn|>system<|body|>Answer in one word.<|end|>"
            "{% if add_generation_prompt %}<|turn|>assistant<|body|>{% endif %}", ONE, ["blue.<|end|>"],
        ),
        (BODY + "Answer in one word.{% if add_generation_prompt %}<|turn|>assistant<|body|>{% endif %}",
            ONE, ["blue.<|end|>"]),
        (
            BODY + "{% if tools %}{{ tools }}{% else %}<|turn|>tools<|body|>none<|end|>{% endif %}"
            + ASKED, TWO, ["blue.<|end|>", "green.<|end|>"],
        ),
        (BODY + ASKED, [assistant("Hello."), *ONE], ["Hello.<|end|>", "blue.<|end|>"]),
        (
            "{% for m in messages %}<|turn|>{{ m.role }}<|body|>{% if m.role == 'assistant' %}{{ '{' }}\"text\": "
            "{{ m.content | tojson }}}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}" + ASKED,
            [assistant("Hello."), *ONE], ['{"text": "Hello."}<|end|>', '{"text": "blue."}<|end|>'],
        ),
        # Behind every turn, and behind calls that have an end of their own or none.
        (
            "{% for m in messages %}<|turn|>{{ m.role }}<|body|>{{ m.content }}<|end|>{% if m.role == 'assistant' %}"
            "<|time|>12:00<|/time|>{% endif %}{% endfor %}" + ASKED, [*ONE, *ONE], ["blue.<|end|>", "blue.<|end|>"],
        ),
        (
            "{% for m in messages %}<|turn|>{{ m.role }}<|body|>{{ m.content or '' }}" + CALLS +
            "{{ '<|result|>' if m.tool_calls else '<|end|>' }}{% endfor %}<|turn|>system<|body|>Be brief.<|end|>"
            + ASKED, CALLED[:2], ['<|call|>add {"a": 1}<|/call|><|result|>'],
        ),
        (
            "{% for m in messages %}<|turn|>{{ m.role }}<|body|>{{ m.content or '' }}" + CALLS +
            "{{ '<|result|>' if m.tool_calls else '<|end|>' }}{% endfor %}" + ASKED,
            [*CALLED[:2], result(1, "\n"), CALLED[3]],
            ['<|call|>add {"a": 1}<|/call|><|result|>', "It is three.<|end|>"],
        ),
        (
            "{% for m in messages %}<|turn|>{{ m.role }}<|body|>{{ m.content or '' }}" + CALLS +
            "{{ '<|end|>' if not m.tool_calls }}{% endfor %}<|turn|>tools<|body|>none<|end|>" + ASKED,
            CALLED[:2], ['<|call|>add {"a": 1}<|/call|>'],
        ),
        (
            "{% for m in messages %}<|turn|>{{ m.role }}<|body|>{{ m.content or '' }}" + CALLS + "<|end|>{% endfor %}"
            "<|turn|>assistant", CALLED[:2], ["<|body|>" + CALL_END],
        ),
        # Two answers in a row: the header of the second is context.
        (
            "{% for m in messages %}{{ '<|end|>' if not loop.first }}<|turn|>{{ m.role }}<|body|>{{ m.content }}"
            "{% endfor %}{% if add_generation_prompt and messages[-1].role != 'assistant' %}<|end|><|turn|>assistant"
            "<|body|>{% endif %}", TWO, ["blue.<|end|>", "green."],
        ),
        (
            "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
            "{% if add_generation_prompt and messages[-1].role == 'user' %}### assistant:\n{% endif %}",
            TWO, ["blue.", "green."],
        ),
        (
            "{% for m in messages %}{% if m.role == 'user' %}Human: {{ m.content }}\n{% else %}"
            "Robot: {{ m.content }}</s>{% endif %}{% endfor %}"
            "{% if add_generation_prompt and messages[-1].role == 'user' %}Robot:{% endif %}",
            TWO, [" blue.</s>", "green.</s>"],
        ),
        (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
            "{% if add_generation_prompt and messages[-1].role == 'user' %}<|assistant|>{% endif %}",
            TWO, ["blue.</s>", "green.</s>"],
        ),
    ],
)  # fmt: skip
def test_kinds_of_templates(
    folders: dict[bool, Path], text: str, messages: Messages, expected: list[str], special: bool
) -> None:
    assert encode(folders[special], text, messages) == expected


REFUSED = [
    # Results of tools within the turn that called them.
    (
        "{% for m in messages %}{% if m.role != 'tool' %}<|turn|>{{ m.role }}<|body|>{% if m.tool_calls %}" + CALLS
        + "<|result|>{{ messages[loop.index0 + 1].content if not loop.last }}<|/result|>{% endif %}"
        "{{ m.content or '' }}<|end|>{% endif %}{% endfor %}" + ASKED,
        [user("sum?"), assistant("Now.", tool_calls=[call(1, a=1)]), result(1, "three"), assistant("It is three.")],
        r"the text of message 2 \(tool\) lies inside a turn of the assistant \(at .*⟨here⟩three",
    ),
    (
        "<|turn|>assistant<|body|>{% for m in messages %}{{ m.content }} {% endfor %}<|end|>",
        [user("red?"), assistant("blue."), user("pink?"), assistant("green.")],
        None,
    ),
    # Calls that the template has no place for.
    (
        BODY,
        [user("sum?"), assistant("Now.", tool_calls=[call(1, a=1)]), result(1, "3"), assistant("3.")],
        "call of 'add'",
    ),
    (
        BODY.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls[0].function.name if m.tool_calls }}"),
        [user("?"), assistant("Now.", tool_calls=[call(1, a=1), call(2, "sub")]), result(1, "3"), assistant("3.")],
        "call of 'sub'",
    ),
    # A turn written as two.
    (
        "{% for m in messages %}<|turn|>{{ m.role }}<|body|>" + CALLS
        + "{% if m.tool_calls and m.content %}</s><|turn|>assistant<|body|>{% endif %}{{ m.content or '' }}</s>"
        "{% endfor %}" + ASKED,
        [user("sum?"), assistant("Now.", tool_calls=[call(1, a=1)]), result(1, "3"), assistant("3.")],
        "as two turns",
    ),
    (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}<|turn|>assistant<|body|><|call|>{{ c.function.name }}"
        "<|/call|></s>{% endfor %}{% if m.content %}<|turn|>{{ m.role }}<|body|>{{ m.content }}</s>{% endif %}"
        "{% endfor %}" + ASKED,
        [user("?"), assistant(None, tool_calls=[call(1), call(2, "sub")]), result(1, "3"), assistant("3.")],
        "as two turns",
    ),
    (
        "{% for m in messages %}<|turn|>{{ m.role }}<|body|>{{ m.content or '' }}<|end|>{% if m.tool_calls %}"
        "<|turn|>call<|body|>" + CALLS + "<|end|>{% endif %}{% endfor %}" + ASKED,
        [user("sum?"), assistant("Now.", tool_calls=[call(1, a=1)]), result(1, "3"), assistant("3.")],
        "turns of several kinds",
    ),
    (
        "{% for m in messages %}{% if m.reasoning_content %}<|turn|>think<|body|>{{ m.reasoning_content }}<|end|>"
        "{% endif %}<|turn|>{{ m.role }}<|body|>{{ m.content }}<|end|>{% endfor %}" + ASKED,
        [user("red?"), assistant("blue.", reasoning_content="Hm.")],
        "1 cannot be told",
    ),
    # An answer that is not there as it is said, and one that is there twice.
    (BODY.replace("m.content", "m.content[::-1]"), [user("red?"), assistant("some words")], "1 cannot be told"),
    (BODY.replace("{{ m.content }}", "{{ m.content }} {{ m.content }}"), [*ONE, user("x"), assistant("y")], None),
    (
        "{% for m in messages %}{% if m.content is not string %}<|turn|>{{ m.role }}<|body|>{{ m.content[0].text }}"
        "{% else %}<|turn|>{{ m.role }}<|body|>{% endif %}<|end|>{% endfor %}",
        ONE, "of message 1 cannot be told",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "messages", "detail"), REFUSED)
def test_what_cannot_be_told_is_refused(
    folders: dict[bool, Path], text: str, messages: Messages, detail: str | None
) -> None:
    found = encode(folders[True], text, messages)
    if detail is None and not isinstance(found, Problem):
        # What is found all the same is what was said.
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        assert all(any(answer in span for span in found) for answer in said)
        others = [message["content"] for message in messages if message["role"] == "user"]
        assert not any(other in span for span in found for other in others)
        return
    assert isinstance(found, Problem) and found.reason == "assistant's turn not found", found
    assert "--chat-template FILE" in found.detail
    assert detail is None or re.search(detail, found.detail), found.detail


def test_a_template_for_command_s_calls(folders: dict[bool, Path]) -> None:
    """A header unasked, and answers and calls that open with marks of their own."""
    text = (
        "{% for m in messages %}<|turn|>{{ m.role }}<|body|>{% if m.tool_calls %}<|/body|>[{% for c in m.tool_calls %}"
        '{"tool": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}{% endfor %}]'
        "{% else %}<|result|>{{ m.content }}{% endif %}<|end|>{% endfor %}<|turn|>assistant<|body|>"
    )
    call_text = '<|/body|>[{"tool": "add", "parameters": {"a": 1}}]<|end|>'
    assert encode(folders[True], text, CALLED) == [call_text, "<|result|>It is three.<|end|>"]


def test_empty_answers_in_the_middle(folders: dict[bool, Path]) -> None:
    messages = [user("red?"), assistant(""), user("green?"), assistant("pink.")]
    for name, template in TEMPLATES.items():
        found = encode(folders[template.specials], template.text, messages)
        said = [template.said(messages, 1), template.said(messages, 3)]
        assert found == [one for one in said if one], name
    skipping = "{% for m in messages if m.content %}<|turn|>{{ m.role }}<|body|>{{ m.content }}<|end|>{% endfor %}"
    assert encode(folders[True], skipping, messages) == ["pink.<|end|>"]


def test_marks_that_are_no_tokens_end_no_turn_for_the_summary(folders: dict[bool, Path]) -> None:
    template = TEMPLATES["no marks of the tokenizer"]
    for special, notes in ((True, ()), (False, (NO_END,))):
        tokenizer = load_tokenizer(folders[special])
        settings = ChatSettings(template=TemplateSettings(template.text))
        [found] = settings.build(tokenizer).encode([{"messages": ONE}])
        assert isinstance(found, Encoded) and found.notes == notes


def test_renderings_do_not_grow_with_the_turns(folders: dict[bool, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    render = ChatTemplate.render

    def counted(self: ChatTemplate, *arguments: Any, **named: Any) -> str:
        nonlocal count
        count += 1
        return render(self, *arguments, **named)

    monkeypatch.setattr(ChatTemplate, "render", counted)
    for name, template in TEMPLATES.items():
        encoder = ChatSettings(template=TemplateSettings(template.text)).build(
            load_tokenizer(folders[template.specials])
        )
        counts = []
        for turns in (1, 4, 32):  # the first one also looks at the template
            messages = [one for n in range(turns) for one in (user(f"q{n}"), assistant(f"a{n}"))]
            count = 0
            [found] = encoder.encode([{"messages": messages}])
            assert isinstance(found, Encoded)
            counts.append(count)
        assert counts[1] == counts[2] < 6, (name, counts)


WORDS = st.sampled_from(
    ["red", "blue", " ", "\n", "<", "|", ">", "<|end|>", "<|turn|>", "</s>", "é", "[", "END", ":", "."]
)
TEXTS = st.lists(WORDS, max_size=5).map("".join)
SAID = TEXTS.filter(str.strip)
ARGUMENTS = st.dictionaries(st.sampled_from(["a", "b"]), st.one_of(SAID, st.integers(0, 99), st.none()), max_size=2)


@st.composite
def turns(draw: st.DrawFn, takes_calls: bool) -> Messages:
    """A question and what follows it: an answer, an empty one, thoughts, calls with results, two answers."""
    kind = draw(st.sampled_from(["answer", "empty", "thought", "two", *(["calls", "calls"] if takes_calls else [])]))
    asked = user(draw(SAID))
    if kind == "empty":
        return [asked, assistant("")]
    if kind == "thought":
        return [asked, assistant(draw(SAID), reasoning_content=draw(SAID))]
    if kind == "two":
        return [asked, assistant(draw(SAID)), assistant(draw(SAID))]
    if kind == "calls":
        made = [
            call(n, draw(st.sampled_from(["add", "sub"])), **draw(ARGUMENTS)) for n in range(draw(st.integers(1, 2)))
        ]
        results = [result(n, draw(SAID), one["function"]["name"]) for n, one in enumerate(made)]
        return [asked, assistant(draw(st.sampled_from([None, ""])), tool_calls=made), *results, assistant(draw(SAID))]
    return [asked, assistant(draw(SAID))]


def chats(takes_calls: bool) -> st.SearchStrategy[Messages]:
    return st.lists(turns(takes_calls), min_size=1, max_size=3).map(lambda some: [one for turn in some for one in turn])


def expected_spans(template: Template, messages: Messages) -> list[str]:
    said = [template.said(messages, n) for n, message in enumerate(messages) if message["role"] == "assistant"]
    return [one for one in said if one]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_any_conversation_is_right_or_refused(name: str, folders: dict[bool, Path]) -> None:
    template = TEMPLATES[name]
    tokenizer = load_tokenizer(folders[template.specials])
    encoder: ChatEncoder = ChatSettings(template=TemplateSettings(template.text)).build(tokenizer)
    own = AutoTokenizer.from_pretrained(folders[template.specials])
    results = []

    @settings(max_examples=30, deadline=None)
    @given(messages=chats(template.takes_calls))
    def check(messages: Messages) -> None:
        if not (messages[-1]["content"] or "").strip():
            messages = [*messages, user("x"), assistant("y")]
        [found] = encoder.encode([{"messages": messages}])
        results.append(isinstance(found, Encoded))
        if isinstance(found, Problem):
            return
        assert found.ids.tolist() == own.apply_chat_template(messages, chat_template=template.text)["input_ids"]
        said, expected = spans_of(tokenizer, found), expected_spans(template, messages)
        # Without a header between them two turns in a row are one run of tokens.
        assert said == expected if template.has_header else "".join(said) == "".join(expected)

    check()
    assert sum(results) > 0.8 * len(results), f"{sum(results)} of {len(results)} are not refused"
