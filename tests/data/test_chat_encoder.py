"""Masks of conversations, against expectations written by hand, and their ids, against transformers."""

from __future__ import annotations

import pickle
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megakd.common.errors import UserError
from megakd.data.chat_encoder import ChatSettings, TemplateSettings
from megakd.data.records import EMPTY_TURN, LEFT_OUT, NO_END, SPECIAL_TEXT, Encoded, Problem
from megakd.data.tokenizer import load_tokenizer
from tests.data.chat_tokenizers import SPECIAL, TEMPLATES, byte_level, metaspace, template

Messages = list[dict[str, Any]]


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token per byte, so that segments of text say exactly which tokens they are."""
    return byte_level(tmp_path_factory.mktemp("letters"))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def calls(name: str, **arguments: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "arguments": arguments}}]


def encode(folder: Path, messages: object, text: str | None, tools: object = None) -> Encoded | Problem:
    chat = pickle.loads(pickle.dumps(ChatSettings(template=TemplateSettings(text))))
    record = {"messages": messages} if tools is None else {"messages": messages, "tools": tools}
    [result] = chat.build(load_tokenizer(folder)).encode([record])
    return result


def segments(folder: Path, example: Encoded | Problem) -> list[tuple[str, int]]:
    """The tokens' text, tokens of equal mask together."""
    assert isinstance(example, Encoded), example
    assert example.mask is not None and len(example.mask) == len(example.ids)
    tokenizer = load_tokenizer(folder)
    pairs = zip(example.ids.tolist(), example.mask.tolist(), strict=True)
    return [
        (tokenizer.decode([index for index, _ in group]), value)
        for value, group in groupby(pairs, lambda pair: pair[1])
    ]


END = "<|im_end|>"
TURN = "<|im_start|>"
HEADER = "<|im_start|>assistant\n"


def test_chatml(letters: Path) -> None:
    messages = [user("One?"), assistant("1"), user("Two?"), assistant("2")]
    assert segments(letters, encode(letters, messages, template("chatml"))) == [
        (f"{TURN}system\nYou help.{END}\n{TURN}user\nOne?{END}\n{HEADER}", 0),
        (f"1{END}", 1),
        (f"\n{TURN}user\nTwo?{END}\n{HEADER}", 0),
        (f"2{END}", 2),
        ("\n", 0),
    ]


def test_chatml_keeps_outer_spaces(letters: Path) -> None:
    messages = [system(""), user(" q "), assistant("\n 1\n\n"), user(""), assistant("  2 \n"), user("rest")]
    assert segments(letters, encode(letters, messages, template("chatml"))) == [
        (f"{TURN}system\n{END}\n{TURN}user\n q {END}\n{HEADER}", 0),
        (f"\n 1\n\n{END}", 1),
        (f"\n{TURN}user\n{END}\n{HEADER}", 0),
        (f"  2 \n{END}", 2),
        (f"\n{TURN}user\nrest{END}\n", 0),
    ]


def test_chatml_tools(letters: Path) -> None:
    messages = [
        user("Weather?"),
        assistant(None, tool_calls=calls("get", city="Łódź")),
        tool("rain"),
        assistant("Let me look", tool_calls=calls("get", day=2)),
        tool("sun"),
        assistant("Sun."),
    ]
    tools = [{"type": "function", "function": {"name": "get"}}]
    assert segments(letters, encode(letters, messages, template("chatml"), tools)) == [
        (
            f'{TURN}system\nYou help.\n[{{"type": "function", "function": {{"name": "get"}}}}]{END}\n'
            f"{TURN}user\nWeather?{END}\n{HEADER}",
            0,
        ),
        (f'<tool_call>\n{{"name": "get", "arguments": {{"city": "Łódź"}}}}\n</tool_call>{END}', 1),
        (f"\n{TURN}user\n<tool_response>\nrain\n</tool_response>{END}\n{HEADER}", 0),
        (f'Let me look\n<tool_call>\n{{"name": "get", "arguments": {{"day": 2}}}}\n</tool_call>{END}', 1),
        (f"\n{TURN}user\n<tool_response>\nsun\n</tool_response>{END}\n{HEADER}", 0),
        (f"Sun.{END}", 2),
        ("\n", 0),
    ]


def test_llama3_trims_and_writes_bos(letters: Path) -> None:
    messages = [system("S"), user("q"), assistant(" a \n"), user("r"), assistant("\n b")]
    begin, behind, end = "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"
    assert segments(letters, encode(letters, messages, template("llama3"))) == [
        (f"<s>{begin}system{behind}S{end}{begin}user{behind}q{end}{begin}assistant{behind}", 0),
        (f"a{end}", 1),
        (f"{begin}user{behind}r{end}{begin}assistant{behind}", 0),
        (f"b{end}", 2),
    ]


def test_llama3_tools(letters: Path) -> None:
    messages = [user("q"), assistant("", tool_calls=calls("f", x=1)), tool("y"), assistant("a")]
    begin, behind, end = "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"
    assert segments(letters, encode(letters, messages, template("llama3"))) == [
        (f"<s>{begin}user{behind}q{end}{begin}assistant{behind}", 0),
        (f'{{"name": "f", "parameters": {{"x": 1}}}}{end}', 1),
        (f"{begin}ipython{behind}y{end}{begin}assistant{behind}", 0),
        (f"a{end}", 2),
    ]


@pytest.mark.parametrize("in_content", [True, False])
def test_qwen3_removes_earlier_thoughts(letters: Path, in_content: bool) -> None:
    def thinks(thought: str, text: str) -> dict[str, Any]:
        if in_content:
            return assistant(f"<think>\n{thought}\n</think>\n\n{text}")
        return assistant(text, reasoning_content=thought)

    messages = [user("q"), thinks("hm", "a"), user("r"), thinks("so", "b")]
    assert segments(letters, encode(letters, messages, template("qwen3"))) == [
        (f"{TURN}user\nq{END}\n{HEADER}", 0),
        (f"a{END}", 1),
        (f"\n{TURN}user\nr{END}\n{HEADER}", 0),
        (f"<think>\nso\n</think>\n\nb{END}", 2),
        ("\n", 0),
    ]


def test_qwen3_writes_empty_thoughts_and_keeps_those_of_tool_calls(letters: Path) -> None:
    empty = encode(letters, [user("q"), assistant("a")], template("qwen3"))
    assert segments(letters, empty)[1:] == [(f"<think>\n\n</think>\n\na{END}", 2), ("\n", 0)]
    messages = [
        user("q"),
        assistant("", reasoning_content="hm", tool_calls=calls("f", x=1)),
        tool("y"),
        assistant(None, reasoning_content="so", tool_calls=calls("g")),
        tool("z"),
        assistant("a", reasoning_content="done"),
    ]
    call_f = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    call_g = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
    answer_y = f"\n{TURN}user\n<tool_response>\ny\n</tool_response>{END}\n{HEADER}"
    answer_z = f"\n{TURN}user\n<tool_response>\nz\n</tool_response>{END}\n{HEADER}"
    assert segments(letters, encode(letters, messages, template("qwen3"))) == [
        (f"{TURN}user\nq{END}\n{HEADER}", 0),
        (f"<think>\nhm\n</think>\n\n{call_f}{END}", 1),
        (answer_y, 0),
        (f"<think>\nso\n</think>\n\n{call_g}{END}", 1),
        (answer_z, 0),
        (f"<think>\ndone\n</think>\n\na{END}", 2),
        ("\n", 0),
    ]
    # With another question behind them all thoughts go, and no shorter conversation begins as this one does.
    assert segments(letters, encode(letters, [*messages, user("r"), assistant("b")], template("qwen3"))) == [
        (f"{TURN}user\nq{END}\n{HEADER}", 0),
        (f"{call_f}{END}", 1),
        (answer_y, 0),
        (f"{call_g}{END}", 1),
        (answer_z, 0),
        (f"a{END}", 1),
        (f"\n{TURN}user\nr{END}\n{HEADER}", 0),
        (f"<think>\n\n</think>\n\nb{END}", 2),
        ("\n", 0),
    ]


def test_mistral_has_no_header(letters: Path) -> None:
    messages = [system("S"), user("q"), assistant("a "), user("r"), assistant("b")]
    assert segments(letters, encode(letters, messages, template("mistral"))) == [
        ("<s>[INST] q[/INST]", 0),
        (" a </s>", 1),
        ("[INST] r[/INST]", 0),
        (" b</s>", 2),
    ]
    messages = [user("q"), assistant(None, tool_calls=calls("f", x=1)), tool("y"), assistant("a")]
    assert segments(letters, encode(letters, messages, template("mistral"))) == [
        ("<s>[INST] q[/INST]", 0),
        ('[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}]</s>', 1),
        ("[TOOL_RESULTS] y[/TOOL_RESULTS]", 0),
        (" a</s>", 2),
    ]


def test_mistral_refuses_other_orders(letters: Path) -> None:
    refused = encode(letters, [user("q"), user("r"), assistant("a")], template("mistral"))
    assert str(refused) == ("refused by the chat template: roles must alternate user/assistant (TemplateError)")


def test_generation_blocks(letters: Path) -> None:
    messages = [
        user("q"),
        assistant("a ", reasoning_content="hm"),
        user("r"),
        assistant("b", reasoning_content="so"),
    ]
    example = encode(letters, messages, template("generation"))
    assert segments(letters, example) == [
        (f"{TURN}user\nq{END}\n{HEADER}", 0),
        (f"<think>hm</think>a {END}", 1),
        (f"\n{TURN}user\nr{END}\n{HEADER}", 0),
        (f"<think>so</think>b{END}", 2),
        ("\n", 0),
    ]
    reference = AutoTokenizer.from_pretrained(letters).apply_chat_template(
        messages, chat_template=template("generation"), return_assistant_tokens_mask=True, return_dict=True
    )
    assert isinstance(example, Encoded) and example.mask is not None
    assert (example.mask > 0).astype(int).tolist() == reference["assistant_masks"]


def test_generation_block_in_a_macro_is_refused(letters: Path) -> None:
    text = "{% macro turn(m) %}x{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}{{ turn(messages[1]) }}"
    with pytest.raises(UserError, match="generation .* in line 1 inside a macro"):
        encode(letters, [user("q"), assistant("a")], text)


def test_no_end_of_turn(letters: Path) -> None:
    messages = [user("q"), assistant("a \n"), user("r"), assistant(" b\n")]
    example = encode(letters, messages, template("no_end"))
    assert segments(letters, example) == [
        ("User: q\nAssistant: ", 0),
        ("a \n", 1),
        ("\nUser: r\nAssistant: ", 0),
        (" b\n", 2),
        ("\n", 0),
    ]
    assert isinstance(example, Encoded) and example.notes == (NO_END,)


def test_no_generation_prompt_and_an_end_of_the_text(letters: Path) -> None:
    messages = [user("q"), assistant("a"), user("r"), assistant("b")]
    assert segments(letters, encode(letters, messages, template("no_prompt"))) == [
        (f"{TURN}user\nq{END}\n{HEADER}", 0),
        (f"a{END}", 1),
        (f"\n{TURN}user\nr{END}\n{HEADER}", 0),
        (f"b{END}\n</s>", 2),
    ]


def test_a_header_that_is_always_written_behind_the_conversation(letters: Path) -> None:
    """As Llama 3's first template does; the end of the user's turns is that of the assistant's."""
    messages = [user("q"), assistant("a"), user("a"), assistant("b ")]
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert segments(letters, encode(letters, messages, template("prompt_always"))) == [
        (f"<s><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>{header}", 0),
        ("a<|eot_id|>", 1),
        (f"<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>{header}", 0),
        ("b <|eot_id|>", 2),
        (header, 0),
    ]


def test_a_header_always_written_and_another_end_than_the_user_s(letters: Path) -> None:
    text = template("prompt_always").replace("'<|eot_id|>'", "('</s>' if m['role'] == 'assistant' else '<|eot_id|>')")
    found = segments(letters, encode(letters, [user("q"), assistant("a"), user("r"), assistant("b")], text))
    assert [one for one in found if one[1]] == [("a</s>", 1), ("b</s>", 2)]


def test_an_earlier_turn_that_ends_otherwise_is_counted(letters: Path) -> None:
    """The mark of the last turn is not there, and what else stands behind may be the next header."""
    messages = [user("q"), assistant("a"), user("r"), assistant("b")]
    example = encode(letters, messages, template("other_end"))
    assert [one for one in segments(letters, example) if one[1]] == [("a", 1), ("b</s>", 2)]
    assert isinstance(example, Encoded) and example.notes == (NO_END,)


@pytest.mark.parametrize(
    ("messages", "name", "notes"),
    [
        ([system("be nice"), user("q"), assistant("a")], "other_end", (LEFT_OUT,)),
        ([user("q"), assistant("<think>hm</think>a")], "dropped", (LEFT_OUT,)),
        ([user(" q "), assistant(" a\n")], "llama3", ()),
        ([user("q"), assistant("a", reasoning_content="hm")], "chatml", (LEFT_OUT,)),
        ([user("q"), assistant("a", reasoning_content="hm")], "qwen3", ()),
        ([user("q"), assistant(""), user("q"), assistant("a")], "chatml", (EMPTY_TURN,)),
    ],
)
def test_what_the_template_leaves_out_and_empty_turns_are_noted(
    letters: Path, messages: list[dict[str, Any]], name: str, notes: tuple[str, ...]
) -> None:
    example = encode(letters, messages, template(name))
    assert isinstance(example, Encoded) and example.notes == notes


def test_a_text_written_as_json_is_not_left_out(letters: Path) -> None:
    text = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    example = encode(letters, [user('say "\u00e9"\n'), assistant("a")], text)
    assert isinstance(example, Encoded) and LEFT_OUT not in example.notes


def test_tools_before_the_last_question(letters: Path) -> None:
    """As Mistral's templates write them: the conversation up to an earlier turn has them in another place."""
    messages = [
        user("q"), assistant(None, tool_calls=calls("f", x=1)), tool("y"), assistant("a"), user("r"), assistant("b"),
    ]  # fmt: skip
    assert segments(letters, encode(letters, messages, template("mistral"), [{"type": "function"}])) == [
        ("<s>[INST] q[/INST]", 0),
        ('[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}]</s>', 1),
        ("[TOOL_RESULTS] y[/TOOL_RESULTS]", 0),
        (" a</s>", 1),
        ('[AVAILABLE_TOOLS] [{"type": "function"}][/AVAILABLE_TOOLS][INST] r[/INST]', 0),
        (" b</s>", 2),
    ]


def test_dropped_thoughts_and_a_prompt_that_is_not_in_the_text(letters: Path) -> None:
    messages = [user("q"), assistant("<think>hm</think>a"), user("r"), assistant("b")]
    assert segments(letters, encode(letters, messages, template("dropped"))) == [
        ("<s><|user|>q<|assistant|>", 0),
        ("a</s>", 1),
        ("<|user|>r<|assistant|>", 0),
        ("b</s>", 2),
    ]


def test_a_turn_that_cannot_be_found_is_a_problem(letters: Path) -> None:
    text = "{% for m in messages %}[{{ m.content | length }}{{ m.content[::-1] }}]{% endfor %}"
    problem = encode(letters, [user("q"), assistant("long answer")], text)
    assert isinstance(problem, Problem) and problem.reason == "assistant's turn not found"
    assert "the start of message 1 cannot be told" in problem.detail


def test_contents_in_parts(letters: Path) -> None:
    def parts(*texts: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text} for text in texts]

    messages = [user("q"), {"role": "assistant", "content": parts("a", " b")}]
    joined = encode(letters, messages, template("llama3"))
    assert segments(letters, joined)[-1] == ("a b<|eot_id|>", 2)
    kept = encode(letters, [{"role": "user", "content": parts("q", "")}, messages[1]], template("parts"))
    assert segments(letters, kept) == [
        (f"{TURN}user\nq|{END}\n{HEADER}", 0),
        (f"a| b{END}", 2),
        ("\n", 0),
    ]


# Ġ and Ċ stand for a space and a newline in byte-level pieces.
MERGES = ((":", "Ġ"), (".", "Ċ"), ("Ġ", "H"), ("ĠH", "i"), ("Ċ", "Ċ"))


def test_tokens_across_both_boundaries(tmp_path: Path) -> None:
    folder = byte_level(tmp_path, MERGES)
    text = "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}"
    example = encode(folder, [user("q"), assistant(" x."), user("r"), assistant("ż.")], text)
    assert isinstance(example, Encoded) and example.mask is not None
    tokenizer = load_tokenizer(folder)
    tokens = [tokenizer.decode([index]) for index in example.ids]
    assert list(zip(tokens, example.mask.tolist(), strict=True)) == [
        ("u", 0), (":", 0), ("q", 0), ("\n", 0), ("a", 0), (": ", 1), ("x", 1), (".\n", 1),
        ("u", 0), (":", 0), ("r", 0), ("\n", 0), ("a", 0), (":", 0), ("\ufffd", 2), ("\ufffd", 2), (".\n", 2),
    ]  # fmt: skip


def test_spaces_that_special_tokens_take_in_are_not_theirs(tmp_path: Path) -> None:
    folder = byte_level(tmp_path, strip=True)
    text = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    text += "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    example = encode(folder, [user("q"), assistant("  a"), user("r"), assistant("b ")], text)
    assert segments(folder, example) == [
        ("<|user|>q<|im_end|><|assistant|>", 0),
        ("a<|im_end|>", 1),
        ("<|user|>r<|im_end|><|assistant|>", 0),
        ("b <|im_end|>", 2),
    ]


@pytest.mark.parametrize("as_normalizer", [True, False])
def test_metaspace_and_bytes(tmp_path: Path, as_normalizer: bool) -> None:
    folder = metaspace(tmp_path, ("\u2581Hi", "\u2581q"), as_normalizer=as_normalizer)
    example = encode(folder, [user("q"), assistant("é"), user("q"), assistant("Hi")], template("mistral"))
    assert isinstance(example, Encoded) and example.mask is not None
    pieces = load_tokenizer(folder).pieces()
    # Llama 2's normalizer puts a second mark in front of a text that has a space.
    first = ["\u2581"] if as_normalizer else []
    expected = [
        ("<s>", 0), ("[INST]", 0), *((mark, 0) for mark in first), ("\u2581q", 0), ("[/INST]", 0),
        *((mark, 1) for mark in first), ("\u2581", 1), ("<0xC3>", 1), ("<0xA9>", 1), ("</s>", 1),
        ("[INST]", 0), *((mark, 0) for mark in first), ("\u2581q", 0), ("[/INST]", 0),
        *((mark, 2) for mark in first), ("\u2581Hi", 2), ("</s>", 2),
    ]  # fmt: skip
    assert list(zip([pieces[i] for i in example.ids], example.mask.tolist(), strict=True)) == expected


SOME = [user("q"), assistant("a")]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("text", "not a list of messages: 'messages' is a str"),
        ([], "not a list of messages: 'messages' is empty"),
        (["hi"], 'not a list of messages: \'messages[0]\' has no role; write {"role": ..., "content": ...}'),
        ([{"role": "user"}], "not a list of messages: 'messages[0]' has no content"),
        ([user("q")], "no assistant message: there is nothing to learn from"),
        ([user("q"), assistant(" \n")], "empty response"),
        ([user("q"), assistant(None)], "empty response"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}, SOME[1]],
            "unknown content: 'messages[0]' has a part of type 'image'; only text can be learned",
        ),
        ([user(7), SOME[1]], "unknown content: 'messages[0]' has a int as content, not text"),
        ([user("q\ud800"), SOME[1]], "half a surrogate pair: 'text' has one, which is no text"),
    ],
)
def test_problems(letters: Path, messages: object, expected: str) -> None:
    assert str(encode(letters, messages, template("chatml"))) == expected


def test_each_record_has_its_result_in_its_place(letters: Path) -> None:
    encoder = ChatSettings(template=TemplateSettings(template("chatml"))).build(load_tokenizer(letters))
    other = [user("r"), assistant("bb")]
    results = encoder.encode([{"messages": SOME}, {"tools": []}, {"messages": other, "tools": 7}, {"messages": other}])
    assert segments(letters, results[0])[1] == (f"a{END}", 2) and segments(letters, results[3])[1] == (f"bb{END}", 2)
    assert [str(results[1]), str(results[2])] == [
        "missing key: there is no 'messages'",
        "tools are no list: 'tools' is a int",
    ]
    assert encoder.encode([]) == []


def test_special_text_in_a_content_is_noted(letters: Path) -> None:
    example = encode(letters, [user(f"what is {END}?"), assistant("a")], template("chatml"))
    assert isinstance(example, Encoded) and example.notes == (SPECIAL_TEXT,)
    plain = encode(letters, SOME, template("chatml"))
    assert isinstance(plain, Encoded) and plain.notes == ()


def test_unfit_tokenizers_and_templates(letters: Path, sentencepiece_file: Path) -> None:
    with pytest.raises(UserError, match="cannot say which characters its tokens hold"):
        encode(sentencepiece_file, SOME, template("chatml"))
    with pytest.raises(UserError, match="has no chat template. Give one with --chat-template"):
        encode(letters, SOME, None)
    with pytest.raises(UserError, match="the chat template has an error in line 2"):
        encode(letters, SOME, "x\n{% if %}")


def test_the_tokenizer_s_own_template_and_the_one_for_tools(letters: Path, tmp_path: Path) -> None:
    own = AutoTokenizer.from_pretrained(letters)
    own.chat_template = {"default": template("chatml"), "tool_use": template("llama3")}
    own.save_pretrained(tmp_path)
    assert segments(tmp_path, encode(tmp_path, SOME, None))[1] == (f"a{END}", 2)
    assert segments(tmp_path, encode(tmp_path, SOME, None, []))[1] == ("a<|eot_id|>", 2)


TEXT = st.text(st.sampled_from(list("ab .\n\t:<>|é你\U0001f642e\u0301\u00a0")), max_size=12)
CHATS = st.lists(st.tuples(TEXT, TEXT.filter(str.strip)), min_size=1, max_size=3)
ENDS = {
    "chatml": END, "llama3": "<|eot_id|>", "qwen3": END, "mistral": "</s>", "generation": END, "no_end": "",
    "no_prompt": END, "dropped": "</s>", "parts": END, "prompt_always": "<|eot_id|>", "other_end": "</s>",
}  # fmt: skip


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(tmp_path_factory.mktemp("merging"), MERGES)


def test_every_template_is_tried() -> None:
    assert set(ENDS) == {path.stem for path in TEMPLATES.glob("*.jinja")}


@pytest.mark.parametrize("name", sorted(ENDS))
def test_any_conversation(name: str, letters: Path, merging: Path) -> None:
    text = template(name)
    parts = [(load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)) for folder in (letters, merging)]
    encoders = [(ChatSettings(template=TemplateSettings(text)).build(tokenizer), own) for tokenizer, own in parts]

    @settings(max_examples=60)
    @given(start=st.none() | TEXT, turns=CHATS)
    def check(start: str | None, turns: list[tuple[str, str]]) -> None:
        messages = [system(start)] if start is not None else []
        for question, answer in turns:
            messages += [user(question), assistant(answer)]
        for encoder, own in encoders:
            [example] = encoder.encode([{"messages": messages}])
            assert isinstance(example, Encoded) and example.mask is not None
            assert example.ids.tolist() == own.apply_chat_template(messages, chat_template=text)["input_ids"]
        [example] = encoders[0][0].encode([{"messages": messages}])
        assert isinstance(example, Encoded) and example.mask is not None
        pairs = zip(example.ids.tolist(), example.mask.tolist(), strict=True)
        counted = [
            (parts[0][0].decode([index for index, _ in group]), value)
            for value, group in groupby(pairs, lambda pair: pair[1])
            if value
        ]
        answers = [answer.strip() if name == "llama3" else answer for _, answer in turns]
        expected = [(" " if name == "mistral" else "") + answer + ENDS[name] for answer in answers]
        if name == "qwen3":
            expected[-1] = "<think>\n\n</think>\n\n" + answers[-1].lstrip("\n") + END
        if name == "no_prompt":
            expected[-1] += "\n</s>"
        if name == "other_end":
            expected[:-1] = answers[:-1]
        assert counted == [(one, 1 + (n == len(turns) - 1)) for n, one in enumerate(expected)]

    check()


def test_special_tokens_are_all_known(letters: Path) -> None:
    own = AutoTokenizer.from_pretrained(letters)
    assert all(len(own.encode(text, add_special_tokens=False)) == 1 for text in SPECIAL)
