"""The data's tokenizer is compared with the teacher's and the first difference is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megakd.common.errors import UserError
from megakd.data.fingerprint import (
    PROBE_TEXTS,
    Difference,
    check_same_tokenizer,
    first_difference,
    metadata_path,
    read_metadata,
    vocabulary_path,
    write_metadata,
)
from megakd.data.tokenizer import load_tokenizer


def record(prefix: Path, tokenizer_path: Path) -> Path:
    tokenizer = load_tokenizer(tokenizer_path)
    write_metadata(prefix, tokenizer, kind="text", documents=1, tokens=2, settings={"appended_eod": True})
    return prefix


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
        check = check_same_tokenizer(prefix, teacher)
        assert check.checked
        assert check.message == "data.train: tokenizer is the teacher's (4096 ids compared)"


def test_a_different_piece_is_named(hugging_face_folder: Path, tmp_path: Path) -> None:
    def rename(contents: Any) -> None:
        vocabulary = contents["model"]["vocab"]
        vocabulary["\u0100other"] = vocabulary.pop("!")

    index = load_tokenizer(hugging_face_folder).pieces().index("!")
    prefix = record(tmp_path / "train", hugging_face_folder)
    teacher = edited(hugging_face_folder, tmp_path / "teacher", rename)
    with pytest.raises(UserError) as error:
        check_same_tokenizer(prefix, teacher, key="data.valid")
    assert str(error.value) == (
        f"data.valid: tokenizer of {prefix} differs from the teacher's at id {index}: '!' there, "
        f"'\u0100other' in the teacher. Preprocess the data with the teacher's tokenizer "
        f"(tools/preprocess_data.py --tokenizer {teacher})."
    )
    vocabulary_path(prefix).unlink()
    with pytest.raises(UserError, match=r"differs from the teacher's in the ids 0 to \d+ "):
        check_same_tokenizer(prefix, teacher)


def test_difference_after_the_first_block(quickstart_teacher: Path, tmp_path: Path) -> None:
    prefix = record(tmp_path / "train", quickstart_teacher)
    pieces = load_tokenizer(quickstart_teacher).pieces()

    def swap(contents: Any) -> None:
        vocabulary = contents["model"]["vocab"]
        a, b = pieces[4090], pieces[4093]
        vocabulary[a], vocabulary[b] = 4093, 4090

    teacher = edited(quickstart_teacher, tmp_path / "teacher", swap)
    with pytest.raises(UserError, match="differs from the teacher's at id 4090: "):
        check_same_tokenizer(prefix, teacher)
    vocabulary_path(prefix).unlink()
    with pytest.raises(UserError, match="in the ids 3072 to 4095 "):
        check_same_tokenizer(prefix, teacher)


def test_same_pieces_but_other_merges(hugging_face_folder: Path, tmp_path: Path) -> None:
    prefix = record(tmp_path / "train", hugging_face_folder)
    teacher = edited(hugging_face_folder, tmp_path / "teacher", lambda c: c["model"].update(merges=[]))
    with pytest.raises(UserError, match=r"though the pieces are the same: token \d+ of the text .* is id \d+ there"):
        check_same_tokenizer(prefix, teacher)


def test_teacher_with_further_ids_is_fine_and_with_fewer_is_not(hugging_face_folder: Path, tmp_path: Path) -> None:
    size = load_tokenizer(hugging_face_folder).vocab_size

    def extend(contents: Any) -> None:
        added = dict(contents["added_tokens"][0], id=size, content="<pad>")
        contents["added_tokens"].append(added)

    larger = edited(hugging_face_folder, tmp_path / "larger", extend)
    assert load_tokenizer(larger).vocab_size == size + 1
    assert check_same_tokenizer(record(tmp_path / "a", hugging_face_folder), larger).checked
    with pytest.raises(UserError, match=f"at id {size}: '<pad>' there, no piece in the teacher"):
        check_same_tokenizer(record(tmp_path / "b", larger), hugging_face_folder)


def test_what_cannot_be_compared_is_said(hugging_face_folder: Path, tmp_path: Path) -> None:
    check = check_same_tokenizer(tmp_path / "train", hugging_face_folder)
    assert not check.checked and "train.json is missing" in check.message
    prefix = record(tmp_path / "train", hugging_face_folder)
    (tmp_path / "bare").mkdir()
    check = check_same_tokenizer(prefix, tmp_path / "bare")
    assert not check.checked and check.message.endswith("bare holds no tokenizer files")


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
