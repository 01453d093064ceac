"""Flags of messages and records: what is learned, what it weighs, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megakd.data.chat_encoder import ChatSettings, TemplateSettings
from megakd.data.chat_flags import FLAGGED_CONTEXT, SKIPPED_TURN, WEIGHTED_TURN
from megakd.data.instruction_encoder import InstructionSettings
from megakd.data.preprocess import preprocess
from megakd.data.records import CONTEXT, EARLIER, RESPONSE, SKIPPED, SKIPPED_LAST, Encoded, Problem, unknown_flag
from megakd.data.tokenizer import load_tokenizer
from tests.data.chat_tokenizers import byte_level, template


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(tmp_path_factory.mktemp("flags"))


def conversation(first: dict[str, Any], last: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": "red?"},
        {"role": "assistant", "content": "bad", **first},
        {"role": "user", "content": "blue?"},
        {"role": "assistant", "content": "good", **(last or {})},
    ]
    return {"messages": messages, **more}


def encode(folder: Path, record: dict[str, Any], name: str = "chatml") -> Encoded | Problem:
    settings = ChatSettings(template=TemplateSettings(template(name)))
    [found] = settings.build(load_tokenizer(folder)).encode([record])
    return found


def learned(folder: Path, found: Encoded | Problem) -> list[tuple[str, int, float]]:
    """Runs of tokens of the assistant's, with their mask and weight."""
    assert isinstance(found, Encoded) and found.mask is not None, found
    tokenizer = load_tokenizer(folder)
    weights = np.ones(len(found.ids)) if found.weights is None else found.weights
    runs: list[tuple[list[int], int, float]] = []
    for index, mask, weight in zip(found.ids.tolist(), found.mask.tolist(), weights.tolist(), strict=True):
        if runs and runs[-1][1:] == (mask, weight):
            runs[-1][0].append(index)
        else:
            runs.append(([index], mask, weight))
    return [(tokenizer.decode(ids), mask, weight) for ids, mask, weight in runs if mask != CONTEXT]


BAD, GOOD = "bad<|im_end|>", "good<|im_end|>"
OFF: list[dict[str, Any]] = [
    {"weight": 0}, {"weight": 0.0}, {"weight": "0"}, {"train": False}, {"train": 0}, {"trainable": False},
    {"trainable": "false"}, {"weight": "false"}, {"train": "off"}, {"loss": False}, {"loss": 0.0}, {"loss_mask": 0},
    {"loss_mask": False},
    {"weight": 1, "train": False}, {"weight": 0, "train": True},
]  # fmt: skip


@pytest.mark.parametrize("flags", OFF)
@pytest.mark.parametrize("name", ["chatml", "generation"])
def test_a_turn_that_is_flagged_off_is_not_learned(folder: Path, flags: dict[str, Any], name: str) -> None:
    found = encode(folder, conversation(flags, dict.fromkeys(flags, 1)), name)
    assert [one[:2] for one in learned(folder, found)] == [(BAD, SKIPPED), (GOOD, RESPONSE)]
    assert isinstance(found, Encoded) and found.notes == (SKIPPED_TURN,) and found.weights is None
    # The last turn too; what is before it is learned all the same.
    found = encode(folder, conversation({}, flags), name)
    assert [one[:2] for one in learned(folder, found)] == [(BAD, EARLIER), (GOOD, SKIPPED)]
    assert isinstance(found, Encoded) and found.notes == (SKIPPED_TURN, SKIPPED_LAST)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"weight": None, "train": None},
        {"weight": "", "loss": " "},
        {"weight": 1.0},
        {"loss": True},
        {"loss_mask": 1},
    ],
)
def test_what_is_on_or_not_said_is_learned(folder: Path, flags: dict[str, Any]) -> None:
    found = encode(folder, conversation(flags))
    assert learned(folder, found) == [(BAD, EARLIER, 1.0), (GOOD, RESPONSE, 1.0)]
    assert isinstance(found, Encoded) and found.notes == () and found.weights is None


def test_numbers_weigh(folder: Path) -> None:
    found = encode(folder, conversation({"weight": 0.25}, {"weight": 3}))
    assert learned(folder, found) == [(BAD, EARLIER, 0.25), (GOOD, RESPONSE, 3.0)]
    assert isinstance(found, Encoded) and found.notes == (WEIGHTED_TURN,)
    found = encode(folder, conversation({"weight": 0.5}, weight=0.5))
    assert learned(folder, found) == [(BAD, EARLIER, 0.25), (GOOD, RESPONSE, 0.5)]


def test_flags_of_a_record_hold_for_all_its_turns(folder: Path) -> None:
    for flags in OFF:
        found = encode(folder, conversation({}, **flags))
        if isinstance(flags.get("loss"), float):  # a column of figures
            assert isinstance(found, Encoded) and found.notes == (unknown_flag("loss"),)
        else:
            assert isinstance(found, Problem) and "flagged" in str(found), flags
    settings = InstructionSettings()
    encoder = settings.build(load_tokenizer(folder))
    pair = {"prompt": "red? ", "response": "blue."}
    off, weighted, plain = encoder.encode([{**pair, "train": False}, {**pair, "weight": 0.5}, pair])
    assert isinstance(off, Problem) and "flagged" in str(off)
    assert learned(folder, weighted) == [("blue.</s>", RESPONSE, 0.5)]
    assert learned(folder, plain) == [("blue.</s>", RESPONSE, 1.0)]
    chat = InstructionSettings(apply_chat_template=True, template=TemplateSettings(template("chatml")))
    [weighted] = chat.build(load_tokenizer(folder)).encode([{**pair, "weight": 0.5}])
    assert learned(folder, weighted) == [("blue.<|im_end|>", RESPONSE, 0.5)]


@pytest.mark.parametrize(
    "weight", [-1, -0.001, float("nan"), float("inf"), 1e39, 1e-60, "heavy", [1], {}, True and "nan"]
)
@pytest.mark.parametrize("whole", [False, True])
def test_weights_that_are_none(folder: Path, weight: object, whole: bool) -> None:
    record = conversation({}, weight=weight) if whole else conversation({"weight": weight})
    found = encode(folder, record)
    assert isinstance(found, Problem) and "it must be a number from 0" in found.detail
    assert ("'weight' is" if whole else "'messages[1].weight' is") in found.detail


def test_weights_whose_product_is_none(folder: Path) -> None:
    for own, whole in ((1e-30, 1e-30), (1e30, 1e30)):
        found = encode(folder, conversation({"weight": own}, weight=whole))
        assert isinstance(found, Problem) and "times the record's" in found.detail


@pytest.mark.parametrize("value", [0.5, "maybe", [0, 1], 2])
def test_switches_that_are_none(folder: Path, value: object) -> None:
    found = encode(folder, conversation({"loss_mask": value}))
    assert isinstance(found, Problem) and "'messages[1].loss_mask' is" in found.detail
    # A record may have such a column of figures, which is said and not used.
    found = encode(folder, conversation({}, loss=value))
    assert isinstance(found, Encoded) and found.notes == (unknown_flag("loss"),)


def test_keys_that_look_like_flags_and_are_not_understood_are_noted(folder: Path) -> None:
    record = conversation({"train_detail": [{"begin": 0}], "note": "x"}, sampleWeights=2, loss_scale=None)
    found = encode(folder, record)
    assert isinstance(found, Encoded)
    assert set(found.notes) == {unknown_flag("train_detail"), unknown_flag("sampleWeights")}
    part = {"type": "text", "text": "bad", "train": False}
    found = encode(folder, conversation({"content": [part]}))
    assert isinstance(found, Encoded) and found.notes == (unknown_flag("train"),)


def test_flags_of_others(folder: Path) -> None:
    for flags, notes in (({"train": False}, ()), ({"weight": 1}, ()), ({"train": True}, (FLAGGED_CONTEXT,))):
        record = conversation({})
        record["messages"][0].update(flags)
        found = encode(folder, record)
        assert learned(folder, found) == [(BAD, EARLIER, 1.0), (GOOD, RESPONSE, 1.0)]
        assert isinstance(found, Encoded) and found.notes == notes


def test_weights_of_turns_in_blocks_without_a_text(folder: Path) -> None:
    """A block that holds no message's text is of the message whose text comes next, or of the last one."""
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}<|user|>{% endgeneration %}:{% generation %}{{ m.content }}{% endgeneration %}:"
        "{% generation %}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    settings = ChatSettings(template=TemplateSettings(text))
    [found] = settings.build(load_tokenizer(folder)).encode([conversation({"weight": 0.5}, {"weight": 2})])
    assert [(one, weight) for one, _, weight in learned(folder, found)] == [
        ("<|user|>", 0.5), ("bad", 0.5), ("<|im_end|>", 2.0), ("<|user|>", 2.0), ("good", 2.0), ("<|im_end|>", 2.0),
    ]  # fmt: skip


def test_the_summary_counts_flags_and_warns_of_others(folder: Path, tmp_path: Path) -> None:
    records = [conversation({"weight": 0}), conversation({"weight": 0.5}), conversation({"train_detail": []})]
    source = tmp_path / "chats.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = ChatSettings(template=TemplateSettings(template("chatml")))
    summary = preprocess([str(source)], tmp_path / "out", folder, settings)
    *_, counts, warning = summary.lines()
    assert counts == f"to know: 1 {SKIPPED_TURN}, 1 {WEIGHTED_TURN}"
    assert warning.startswith(
        "warning: 1 documents have a key that looks like a flag and is not understood: 'train_detail'"
    )
