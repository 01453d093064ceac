"""The data's tokenizer is compared with the teacher's and the first difference is named."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megakd.common.errors import UserError
from megakd.data.fingerprint import (
    PROBE_TEXTS,
    Difference,
    ModelTokenizer,
    check_same_tokenizer,
    first_difference,
    metadata_path,
    read_metadata,
    vocabulary_path,
    write_metadata,
)
from megakd.data.tokenizer import load_tokenizer


def record(prefix: Path, tokenizer_path: Path, max_id: int | None = None) -> Path:
    tokenizer = load_tokenizer(tokenizer_path)
    settings = {"appended_eod": True}
    write_metadata(prefix, tokenizer, kind="text", documents=1, tokens=2, settings=settings, max_id=max_id)
    return prefix


def lines(prefix: Path, teacher: Path, student: Path | None = None, key: str = "data.train") -> list[str]:
    models = [ModelTokenizer("teacher", "teacher.path", str(teacher))]
    models += [] if student is None else [ModelTokenizer("student", "student.init.path", str(student))]
    return check_same_tokenizer(prefix, models, key=key)


def refusal(prefix: Path, teacher: Path, student: Path | None = None, key: str = "data.train") -> str:
    with pytest.raises(UserError) as error:
        lines(prefix, teacher, student, key)
    assert "\n" not in str(error.value)
    return str(error.value)


def edited(folder: Path, target: Path, edit: Any) -> Path:
    """A copy of a Hugging Face tokenizer folder whose tokenizer.json went through `edit`."""
    target.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, target / name)
    contents = json.loads((target / "tokenizer.json").read_text(encoding="utf-8"))
    edit(contents)
    (target / "tokenizer.json").write_text(json.dumps(contents), encoding="utf-8")
    return target


@pytest.mark.parametrize("data_side", ["tokenizer.model", "."])
def test_sentencepiece_and_hugging_face_forms_are_the_same(
    quickstart_teacher: Path, tmp_path: Path, data_side: str
) -> None:
    prefix = record(tmp_path / "train", quickstart_teacher / data_side)
    only_model = tmp_path / "only_model"
    only_model.mkdir()
    shutil.copy(quickstart_teacher / "tokenizer.model", only_model)
    for teacher in (quickstart_teacher, only_model):
        assert lines(prefix, teacher) == []


def test_a_different_piece_is_named(hugging_face_folder: Path, tmp_path: Path) -> None:
    def rename(contents: Any) -> None:
        vocabulary = contents["model"]["vocab"]
        vocabulary["\u0100other"] = vocabulary.pop("!")

    index = load_tokenizer(hugging_face_folder).pieces().index("!")
    prefix = record(tmp_path / "train", hugging_face_folder)
    teacher = edited(hugging_face_folder, tmp_path / "teacher", rename)
    assert refusal(prefix, teacher, key="data.valid") == (
        f"data.valid: tokenizer of {prefix} differs from the teacher's (teacher.path: {teacher}) at id {index}: '!' in "
        f"the data, '\u0100other' in the teacher. Preprocess the data with the teacher's tokenizer "
        f"(tools/preprocess_data.py --tokenizer {teacher})."
    )
    vocabulary_path(prefix).unlink()
    assert f"the teacher's (teacher.path: {teacher}) in the ids 0 to " in refusal(prefix, teacher)


def test_difference_after_the_first_block(quickstart_teacher: Path, tmp_path: Path) -> None:
    prefix = record(tmp_path / "train", quickstart_teacher)
    pieces = load_tokenizer(quickstart_teacher).pieces()

    def swap(contents: Any) -> None:
        vocabulary = contents["model"]["vocab"]
        a, b = pieces[4090], pieces[4093]
        vocabulary[a], vocabulary[b] = 4093, 4090

    teacher = edited(quickstart_teacher, tmp_path / "teacher", swap)
    assert f"differs from the teacher's (teacher.path: {teacher}) at id 4090: " in refusal(prefix, teacher)
    vocabulary_path(prefix).unlink()
    assert "in the ids 3072 to 4095 " in refusal(prefix, teacher)


def test_same_pieces_but_other_merges(hugging_face_folder: Path, tmp_path: Path) -> None:
    prefix = record(tmp_path / "train", hugging_face_folder)
    teacher = edited(hugging_face_folder, tmp_path / "teacher", lambda c: c["model"].update(merges=[]))
    told = refusal(prefix, teacher)
    assert re.search(
        r"though the pieces are the same: token \d+ of the text .* is id \d+ in the data, \d+ in the", told
    )


@pytest.fixture
def larger(hugging_face_folder: Path, tmp_path: Path) -> Path:
    """The tokenizer with a token more at its end."""
    size = load_tokenizer(hugging_face_folder).vocab_size

    def extend(contents: Any) -> None:
        contents["added_tokens"].append(dict(contents["added_tokens"][0], id=size, content="<pad>"))

    folder = edited(hugging_face_folder, tmp_path / "larger", extend)
    assert load_tokenizer(folder).vocab_size == size + 1
    return folder


def renamed(folder: Path, target: Path, piece: str) -> Path:
    """The tokenizer with another piece in the place of "!"."""

    def rename(contents: Any) -> None:
        vocabulary = contents["model"]["vocab"]
        vocabulary[piece] = vocabulary.pop("!")

    return edited(folder, target, rename)


def test_a_model_s_further_ids_are_no_difference(hugging_face_folder: Path, larger: Path, tmp_path: Path) -> None:
    assert lines(record(tmp_path / "train", hugging_face_folder), larger, hugging_face_folder) == []


def test_ids_that_a_model_lacks_at_its_end(hugging_face_folder: Path, larger: Path, tmp_path: Path) -> None:
    """Redoing the data with a tokenizer that lacks the tokens would lose them: they are to be added to the model."""
    size = load_tokenizer(hugging_face_folder).vocab_size
    remedy = (
        f"Add these tokens to {{}}: save the data's tokenizer ({larger}) in the model's folder "
        "and resize its embedding "
        "(resize_token_embeddings in transformers)."
    )
    lacks = f"at its end: it lacks the id {size} ('<pad>')"
    for max_id in (None, size):
        prefix = record(tmp_path / "train", larger, max_id)
        told = refusal(prefix, larger, hugging_face_folder)
        assert told == (
            f"data.train: tokenizer of {prefix} differs from the student's (student.init.path: {hugging_face_folder}) "
            f"{lacks}; it is the teacher's. {remedy.format('the student')}"
        )
        told = refusal(prefix, hugging_face_folder, larger)
        assert f"the teacher's (teacher.path: {hugging_face_folder}) {lacks}; it is the student's. " in told
        assert told.endswith(remedy.format("the teacher"))
        copy = edited(hugging_face_folder, tmp_path / f"copy of {max_id}", lambda contents: None)
        assert refusal(prefix, hugging_face_folder, copy).endswith(remedy.format("the teacher and the student"))
        vocabulary_path(prefix).unlink()
        assert f"in the ids 0 to {size} (" in refusal(prefix, hugging_face_folder)


def test_ids_that_a_model_lacks_and_the_data_does_not_hold(
    hugging_face_folder: Path, larger: Path, tmp_path: Path
) -> None:
    size = load_tokenizer(hugging_face_folder).vocab_size
    prefix = record(tmp_path / "train", larger, size - 1)
    assert lines(prefix, larger, hugging_face_folder) == [
        f"data.train: the student's tokenizer lacks the id {size} ('<pad>'); the data holds none of these ids"
    ]


def test_the_model_that_differs_is_blamed(hugging_face_folder: Path, tmp_path: Path) -> None:
    prefix = record(tmp_path / "train", hugging_face_folder)
    other = renamed(hugging_face_folder, tmp_path / "other", "\u0100other")
    third = renamed(hugging_face_folder, tmp_path / "third", "\u0100third")
    told = refusal(prefix, hugging_face_folder, other)
    assert told.startswith(
        f"data.train: tokenizer of {prefix} differs from the student's (student.init.path: {other}) "
    )
    assert told.endswith(
        "; it is the teacher's. Start from a student with the teacher's tokenizer (student.init.path)."
    )
    told = refusal(prefix, other, hugging_face_folder)
    assert told.startswith(f"data.train: tokenizer of {prefix} differs from the teacher's (teacher.path: {other}) ")
    assert "; it is the student's. Name a teacher with the student's tokenizer, or start from a student with" in told
    again = f"Preprocess the data with the teacher's tokenizer (tools/preprocess_data.py --tokenizer {other})."
    told = refusal(prefix, other, edited(other, tmp_path / "same", lambda contents: None))
    assert "; it differs from the student's (student.init.path: " in told and told.endswith(
        f"too, as that is the teacher's. {again}"
    )
    told = refusal(prefix, other, third)
    assert told.endswith(f"both are different. Start from a student with the teacher's tokenizer, and: {again}")


def test_following_the_advice_helps(hugging_face_folder: Path, tmp_path: Path) -> None:
    other = renamed(hugging_face_folder, tmp_path / "other", "\u0100other")
    assert "--tokenizer {other}" in refusal(record(tmp_path / "a", hugging_face_folder), other).replace(
        str(other), "{other}"
    )
    assert lines(record(tmp_path / "b", other), other) == []


def test_a_tokenizer_is_loaded_once(hugging_face_folder: Path, tmp_path: Path) -> None:
    loaded: list[str] = []

    def load(path: str | Path) -> Any:
        loaded.append(str(path))
        return load_tokenizer(path)

    models = [ModelTokenizer("teacher", "teacher.path", str(hugging_face_folder))]
    once = cache(load)
    for name in "ab":
        assert check_same_tokenizer(record(tmp_path / name, hugging_face_folder), models, load=once) == []
    assert loaded == [str(hugging_face_folder)]


def test_what_cannot_be_compared_is_said(hugging_face_folder: Path, tmp_path: Path) -> None:
    (told,) = lines(tmp_path / "train", hugging_face_folder, tmp_path)
    assert told.startswith("data.train: not checked against the teacher's and the student's tokenizer: ")
    assert "train.json is missing" in told
    prefix = record(tmp_path / "train", hugging_face_folder)
    (tmp_path / "bare").mkdir()
    (told,) = lines(prefix, tmp_path / "bare", hugging_face_folder)
    assert told.endswith(f"not checked against the teacher's tokenizer: {tmp_path}/bare holds no tokenizer files")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("{", "is damaged"),
        ("[1]", "was not written by tools/preprocess_data.py"),
        ('{"format": "megakd-tokens", "version": 99}', "format version 99; this version of megakd reads 1"),
    ],
)
def test_bad_metadata(tmp_path: Path, contents: str, message: str) -> None:
    metadata_path(tmp_path / "train").write_text(contents)
    with pytest.raises(UserError, match=message):
        read_metadata(tmp_path / "train")


def test_first_difference() -> None:
    assert first_difference([[1, 2], [3]], [[1, 2], [3]]) is None
    assert first_difference([[1, 2], [3]], [[1, 2], [4]]) == Difference(1, 0, 3, 4)
    assert first_difference([[1, 2]], [[1]]) == Difference(0, 1, 2, None)
    assert first_difference([[]], [[5]]) == Difference(0, 0, None, 5)


def test_probe_texts_hold_several_kinds_of_text() -> None:
    text = "".join(PROBE_TEXTS)
    assert "\t" in text and "\r\n" in text and "  " in text and "0" in text
    assert any(ord(c) > 0xFFFF for c in text) and any(0x4E00 <= ord(c) < 0x9FFF for c in text)
