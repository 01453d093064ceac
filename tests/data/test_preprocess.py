"""Preprocessing writes a complete data set whose tokens are the documents', or nothing at all."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer as RustTokenizer

from megakd.common.errors import UserError
from megakd.data.fingerprint import check_same_tokenizer, read_metadata
from megakd.data.indexed import TokenStream
from megakd.data.preprocess import find_files, preprocess, write_documents
from megakd.data.tokenizer import load_tokenizer

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"


def documents_of(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)))
    return path


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_jsonl_with_a_hugging_face_tokenizer(hugging_face_folder: Path, corpus: list[str], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", corpus)
    summary = preprocess([str(source)], tmp_path / "out" / "train", hugging_face_folder)
    reference = RustTokenizer.from_file(str(hugging_face_folder / "tokenizer.json"))
    expected = [[*reference.encode(text, add_special_tokens=False).ids, 1] for text in corpus]
    assert documents_of(tmp_path / "out" / "train") == expected
    assert (summary.documents, summary.tokens) == (len(corpus), sum(map(len, expected)))
    assert summary.longest == max(map(len, expected)) and summary.dropped == {}
    assert listing(tmp_path / "out") == ["train.bin", "train.idx", "train.json", "train.vocab.json.gz"]
    metadata = read_metadata(tmp_path / "out" / "train")
    assert metadata is not None
    assert (metadata["documents"], metadata["tokens"]) == (summary.documents, summary.tokens)
    assert metadata["tokenizer"]["eod_id"] == 1
    assert check_same_tokenizer(tmp_path / "out" / "train", hugging_face_folder).checked


def test_bos_and_eod_with_a_sentencepiece_model(sentencepiece_file: Path, corpus: list[str], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", corpus, key="body")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    for bos, eod in [(True, True), (True, False), (False, False)]:
        preprocess(
            [str(source)],
            tmp_path / "train",
            sentencepiece_file,
            json_key="body",
            prepend_bos=bos,
            append_eod=eod,
            overwrite=True,
        )
        expected = [[1] * bos + reference.encode(text) + [2] * eod for text in corpus]
        assert documents_of(tmp_path / "train") == expected


def test_quickstart_teacher_s_two_forms_write_the_same_tokens(
    quickstart_teacher: Path, corpus: list[str], tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", corpus)
    preprocess([str(source)], tmp_path / "a", quickstart_teacher)
    preprocess([str(source)], tmp_path / "b", quickstart_teacher / "tokenizer.model")
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "b.idx").read_bytes()


def test_folders_are_walked_in_sorted_order(sentencepiece_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    for name, text in {"b.py": "bb", "a/z.txt": "zz", "a/c.py": "cc", ".git/x": "no", ".hidden": "no"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    write_jsonl(folder / "c.jsonl", ["one", "two"])
    (folder / "binary.dat").write_bytes(b"\xff\xfe\x00")
    (folder / "empty.txt").write_text("")
    summary = preprocess([str(folder)], tmp_path / "train", sentencepiece_file)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    expected = ["bb", "one", "two", "cc", "zz"]
    assert documents_of(tmp_path / "train") == [[*reference.encode(text), 2] for text in expected]
    assert summary.dropped == {"not UTF-8 text": 1, "empty": 1}
    assert "dropped: 1 empty, 1 not UTF-8 text" in summary.lines()


def test_format_overrides_the_ending(sentencepiece_file: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.txt", ["one", "two"])
    assert preprocess([str(source)], tmp_path / "a", sentencepiece_file).documents == 1
    assert preprocess([str(source)], tmp_path / "b", sentencepiece_file, format="jsonl").documents == 2


def test_patterns(tmp_path: Path) -> None:
    for name in ("b.py", "a.py", "c.txt", "sub/d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert find_files([f"{tmp_path}/*.py"]) == [tmp_path / "a.py", tmp_path / "b.py"]
    found = find_files([f"{tmp_path}/c.txt", f"{tmp_path}/**/*.py"])
    assert found[0] == tmp_path / "c.txt" and sorted(found[1:]) == sorted(tmp_path.rglob("*.py"))
    with pytest.raises(UserError, match=r"--input .*nothing\*: no such file or folder"):
        find_files([f"{tmp_path}/nothing*"])
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="no file is there"):
        find_files([f"{tmp_path}/bare"])


def test_line_ends_and_blank_lines_inside_jsonl(sentencepiece_file: Path, tmp_path: Path) -> None:
    text = "a\u2028b\x85c\r\nd"
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": text}, ensure_ascii=False).encode() + b"\r\n\n \n")
    assert preprocess([str(source)], tmp_path / "train", sentencepiece_file).documents == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"in.jsonl:2: not a line of JSON"),
        (b'{"text": "\xff"}', r"in.jsonl:2: not a line of JSON"),
        (b"[" * 100_000, r"in.jsonl:2: not a line of JSON"),
        (b'["a"]', r"in.jsonl:2: a list, not a JSON object"),
        (b'{"body": "a", "id": 1}', r"in.jsonl:2: no key 'text' \(keys there: body, id\).*--json-key"),
        (b'{"text": 5}', r"in.jsonl:2: 'text' is a int, not a string"),
        (b'{"text": "\\ud800"}', r"in.jsonl:2: 'text' has half of a surrogate pair"),
    ],
)
def test_bad_lines_stop_the_run_and_leave_nothing(
    sentencepiece_file: Path, tmp_path: Path, line: bytes, message: str
) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        preprocess([str(tmp_path / "in.jsonl")], tmp_path / "train", sentencepiece_file)
    assert listing(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "the input has none"),
        (b"\n\n", "the input has none"),
        (b'{"text": ""}\n', "the input has 1 dropped as empty"),
    ],
)
def test_no_document_left(sentencepiece_file: Path, tmp_path: Path, contents: bytes, message: str) -> None:
    (tmp_path / "in.jsonl").write_bytes(contents)
    with pytest.raises(UserError, match=f"no document for .*train: {message}"):
        preprocess([str(tmp_path / "in.jsonl")], tmp_path / "train", sentencepiece_file)
    assert listing(tmp_path) == ["in.jsonl"]


def test_existing_output_is_refused_and_kept(sentencepiece_file: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_file)
    write_documents(["one", "two"], tmp_path / "train", tokenizer)
    before = (tmp_path / "train.bin").read_bytes()
    with pytest.raises(UserError, match=r"train.bin exists. Use --overwrite"):
        write_documents(["three"], tmp_path / "train", tokenizer)
    with pytest.raises(UserError, match="no document"):
        write_documents([], tmp_path / "train", tokenizer, overwrite=True)
    assert (tmp_path / "train.bin").read_bytes() == before
    assert TokenStream(tmp_path / "train").num_documents == 2
    write_documents(["three"], tmp_path / "train", tokenizer, overwrite=True)
    assert TokenStream(tmp_path / "train").num_documents == 1


def test_an_interrupted_run_leaves_nothing(sentencepiece_file: Path, tmp_path: Path) -> None:
    def documents() -> Iterator[str]:
        yield "x" * 2_000_000  # more than one chunk, so that something was written
        assert listing(tmp_path) != [], "the run writes aside"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_documents(documents(), tmp_path / "train", load_tokenizer(sentencepiece_file))
    assert listing(tmp_path) == []


def test_an_interruption_among_the_renames_looks_incomplete(
    sentencepiece_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(sentencepiece_file)
    write_documents(["one", "two"], tmp_path / "train", tokenizer)
    replace = os.replace

    def stop_at_the_last(source: str, target: Path) -> None:
        if str(target).endswith(".idx"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        write_documents(["three"], tmp_path / "train", tokenizer, overwrite=True)
    with pytest.raises(UserError, match="train.idx does not exist"):
        TokenStream(tmp_path / "train")


def test_output_that_is_an_input(sentencepiece_file: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "train.json", ["one"])
    with pytest.raises(UserError, match=r"train.json is an input and an output"):
        preprocess([str(source)], tmp_path / "train", sentencepiece_file, format="jsonl", overwrite=True)
    assert source.read_text() == '{"id": 0, "text": "one"}\n'
    with pytest.raises(UserError, match="names a folder"):
        preprocess([str(source)], f"{tmp_path}/", sentencepiece_file)


def test_tokenizer_without_the_tokens_asked_for(corpus: list[str], tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus * 4),
        model_prefix=str(tmp_path / "m"),
        vocab_size=60,
        bos_id=-1,
        eos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "m.model")
    with pytest.raises(UserError, match="has no eos token. Use --no-append-eod"):
        write_documents(corpus, tmp_path / "train", tokenizer)
    with pytest.raises(UserError, match="has no bos token. Leave out --prepend-bos"):
        write_documents(corpus, tmp_path / "train", tokenizer, append_eod=False, prepend_bos=True)
    assert write_documents(corpus, tmp_path / "train", tokenizer, append_eod=False).documents == len(corpus)


def test_the_reader_s_drops_are_in_the_summary(sentencepiece_file: Path, tmp_path: Path) -> None:
    dropped: Counter[str] = Counter(duplicate=3)
    summary = write_documents(["", "a"], tmp_path / "train", load_tokenizer(sentencepiece_file), dropped=dropped)
    assert summary.dropped == {"duplicate": 3, "empty": 1}


def test_the_tool_runs_from_a_clone_and_says_what_it_did(sentencepiece_file: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["one two", "three"])
    options = ["--input", str(source), "--output-prefix", "out/train", "--prepend-bos", "--workers", "2"]
    command = [sys.executable, str(TOOL), "--tokenizer", str(sentencepiece_file), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Transformer Engine" not in done.stderr
    assert "out/train.bin, .idx: 2 documents, " in done.stdout and "dropped: nothing" in done.stdout
    assert [document[0] for document in documents_of(tmp_path / "out" / "train")] == [1, 1]


def test_the_tool_s_errors_are_one_line_and_status_2(
    sentencepiece_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("preprocess_data", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": \n')

    def run(source: str) -> tuple[int, str]:
        prefix = str(tmp_path / "train")
        options = ["--input", str(tmp_path / source), "--output-prefix", prefix, "--tokenizer", str(sentencepiece_file)]
        status = tool.main(options)
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        return status, captured.err

    for source, line in [
        ("empty.jsonl", f"error: no document for {tmp_path}/train: the input has none."),
        ("in.jsonl", f"error: {tmp_path}/in.jsonl:2: not a line of JSON"),
        ("missing.jsonl", f"error: --input {tmp_path}/missing.jsonl: no such file"),
    ]:
        status, error = run(source)
        assert status == 2 and error.startswith(line)
    assert listing(tmp_path) == ["empty.jsonl", "in.jsonl"]
