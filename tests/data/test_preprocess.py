"""Preprocessing writes a complete data set whose tokens are the documents', or nothing at all."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer as RustTokenizer

from megakd.common.errors import UserError
from megakd.data import encoding
from megakd.data.fingerprint import ModelTokenizer, check_same_tokenizer, read_metadata
from megakd.data.indexed import TokenStream
from megakd.data.preprocess import preprocess, write_documents
from megakd.data.progress import InputBar
from megakd.data.record_kind import record_settings
from megakd.data.text_encoder import TextSettings
from megakd.data.tokenizer import load_tokenizer
from tests.data.half_learned import HalfLearnedSettings

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"


def documents_of(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)))
    return path


def skipped(prefix: Path) -> list[tuple[str, int, str]]:
    lines = Path(f"{prefix}.skipped.jsonl").read_text().splitlines()
    return [(entry["file"], entry["line"], entry["reason"]) for entry in map(json.loads, lines)]


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
    assert metadata["max_id"] == max(map(max, expected))
    teacher = ModelTokenizer("teacher", "teacher.path", str(hugging_face_folder))
    assert check_same_tokenizer(tmp_path / "out" / "train", [teacher]) == []


def test_bos_and_eod_with_a_sentencepiece_model(sentencepiece_file: Path, corpus: list[str], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", corpus, key="body")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    for bos, eod in [(True, True), (True, False), (False, False)]:
        preprocess(
            [str(source)],
            tmp_path / "train",
            sentencepiece_file,
            TextSettings("body", append_eod=eod, prepend_bos=bos),
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
    summary = preprocess([str(folder)], tmp_path / "train", sentencepiece_file, on_error="skip")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    expected = ["bb", "one", "two", "cc", "zz"]
    assert documents_of(tmp_path / "train") == [[*reference.encode(text), 2] for text in expected]
    assert summary.dropped == {"not UTF-8 text": 1, "empty": 1}
    assert f"dropped: 1 empty, 1 not UTF-8 text (listed in {tmp_path}/train.skipped.jsonl)" in summary.lines()
    assert skipped(tmp_path / "train") == [
        (f"{folder}/binary.dat", 1, "not UTF-8 text"),
        (f"{folder}/empty.txt", 1, "empty"),
    ]


def test_format_overrides_what_is_inside(sentencepiece_file: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.txt", ["one", "two"])
    assert preprocess([str(source)], tmp_path / "a", sentencepiece_file, format="text").documents == 1
    assert preprocess([str(source)], tmp_path / "b", sentencepiece_file, format="jsonl").documents == 2
    assert preprocess([str(source)], tmp_path / "c", sentencepiece_file).documents == 2


def test_line_ends_and_blank_lines_inside_jsonl(sentencepiece_file: Path, tmp_path: Path) -> None:
    text = "a\u2028b\x85c\r\nd"
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": text}, ensure_ascii=False).encode() + b"\r\n\n \n")
    assert preprocess([str(source)], tmp_path / "train", sentencepiece_file).documents == 1


BAD_LINES = [
    (b'{"text": "a"', "not JSON", "not JSON: Expecting"),
    (b'{"text": "\xff"}', "not UTF-8 text", "not UTF-8 text. Correct"),
    (b"[" * 100_000, "not JSON", "not JSON: "),
    (b'{"text": "a\0b"}', "not JSON", "not JSON: Invalid control character"),
    (b'["a"]', "not a JSON object", "not a JSON object: a list"),
    (b'{"body": "a", "id": 1}', "missing key", r"missing key: no 'text' \(there: body, id\). Name the"),
    (b'{"text": 5}', "wrong type", "wrong type: 'text' is a int, not a string"),
    (b'{"text": null}', "wrong type", "wrong type: 'text' is a null, not a string"),
    (b'{"text": "\\ud800"}', "half a surrogate pair", "half a surrogate pair: 'text' has one"),
]


@pytest.mark.parametrize(("line", "reason", "message"), BAD_LINES)
def test_a_bad_line_stops_the_run_and_leaves_nothing_or_is_skipped(
    sentencepiece_file: Path, tmp_path: Path, line: bytes, reason: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "a\\u0000b"}\n')
    with pytest.raises(UserError, match=f"in.jsonl:2: {message}.*--on-error skip"):
        preprocess([str(source)], tmp_path / "train", sentencepiece_file)
    assert listing(tmp_path) == ["in.jsonl"] and capsys.readouterr().err == ""
    summary = preprocess([str(source)], tmp_path / "train", sentencepiece_file, on_error="skip")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    assert documents_of(tmp_path / "train") == [[*reference.encode(text), 2] for text in ("fine", "a\0b")]
    assert summary.dropped == {reason: 1} and skipped(tmp_path / "train") == [(str(source), 2, reason)]
    assert capsys.readouterr().err.startswith(f"skipped {source}:2: {reason}")


def test_a_long_line_is_a_document_and_its_place_is_told(sentencepiece_file: Path, tmp_path: Path) -> None:
    long = "one two three four " * 550_000
    source = write_jsonl(tmp_path / "in.jsonl", ["short", long, "short"])
    summary = preprocess([str(source)], tmp_path / "train", sentencepiece_file)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    assert documents_of(tmp_path / "train")[1] == [*reference.encode(long), 2]
    assert summary.longest_place == f"{source}:2" and f"({source}:2)" in summary.lines()[1]


def test_the_first_twenty_are_shown_and_all_are_listed(
    sentencepiece_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "fine"}\n' + 'bad\n{"text": ""}\n' * 30)
    summary = preprocess([str(source)], tmp_path / "train", sentencepiece_file, on_error="skip")
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 21 and shown[19].startswith(f"skipped {source}:40: not JSON")
    assert shown[20] == f"skipped more; {tmp_path}/train.skipped.jsonl will list all of them"
    assert summary.dropped == {"not JSON": 30, "empty": 30}
    expected = [(str(source), line, "empty" if line % 2 else "not JSON") for line in range(2, 62)]
    assert skipped(tmp_path / "train") == expected


GOOD = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(lambda text: text.strip())
BAD = st.sampled_from([line for line, _, _ in BAD_LINES if len(line) < 1000])


@settings(max_examples=60)
@given(lines=st.lists(st.one_of(GOOD, BAD, st.sampled_from(["", b"", b"  "])), max_size=40), data=st.data())
def test_every_good_line_arrives_and_every_bad_one_is_listed(
    byte_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory, lines: list[str | bytes], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    written, documents, bad = [], ["first"], []
    ascii_only = data.draw(st.booleans())
    for number, line in enumerate(["first", *lines], start=1):
        if isinstance(line, bytes):
            written.append(line)
            if line.strip():
                bad.append((str(folder / "in.jsonl"), number))
            continue
        written.append(json.dumps({"text": line}, ensure_ascii=ascii_only).encode())
        if line:
            documents += [line] if number > 1 else []
        else:
            bad.append((str(folder / "in.jsonl"), number))
    end = data.draw(st.sampled_from([b"\n", b"\r\n"]))
    (folder / "in.jsonl").write_bytes(end.join(written) + data.draw(st.sampled_from([b"", end])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "CHUNK_RECORDS", data.draw(st.integers(1, 9)))
        summary = preprocess([str(folder / "in.jsonl")], folder / "train", byte_tokenizer, on_error="skip")
    found = [bytes(ids[:-1]).decode() for ids in documents_of(folder / "train")]
    assert found == documents and summary.documents == len(documents)
    listed = skipped(folder / "train") if bad else []
    assert [entry[:2] for entry in listed] == bad
    assert sum(summary.dropped.values()) == len(bad) and (folder / "train.skipped.jsonl").exists() == bool(bad)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "the input has none"),
        (b"\n\n", "the input has none"),
        (b'{"text": ""}\n', "the input has 1 empty"),
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


@pytest.mark.parametrize("workers", [1, 2])
def test_masks_lie_beside_the_tokens(sentencepiece_file: Path, corpus: list[str], tmp_path: Path, workers: int) -> None:
    texts = corpus * 3
    texts[5] = "odd"
    source = write_jsonl(tmp_path / "in.jsonl", texts, key="body")
    preprocess(
        [str(source)],
        tmp_path / "train",
        sentencepiece_file,
        HalfLearnedSettings(),
        on_error="skip",
        workers=workers,
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    expected = [reference.encode(text) for text in texts if text != "odd"]
    assert documents_of(tmp_path / "train") == expected
    masks = IndexedDataset(str(tmp_path / "train.mask"))
    assert masks[0].dtype == np.uint8
    assert [masks[i].tolist() for i in range(len(masks))] == [[i % 2 for i in range(len(ids))] for ids in expected]
    metadata = read_metadata(tmp_path / "train")
    assert metadata is not None and metadata["kind"] == "examples" and metadata["half"]
    write_documents(["one"], tmp_path / "train", load_tokenizer(sentencepiece_file), overwrite=True)
    metadata = read_metadata(tmp_path / "train")
    assert metadata is not None and metadata["kind"] == "text" and metadata["appended_eod"]
    assert listing(tmp_path) == ["in.jsonl", "train.bin", "train.idx", "train.json", "train.vocab.json.gz"]


def test_the_tool_runs_from_a_clone_and_says_what_it_did(sentencepiece_file: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["one two", "three"])
    options = ["--input", str(source), "--output-prefix", "out/train", "--prepend-bos", "--workers", "2"]
    command = [sys.executable, str(TOOL), "--tokenizer", str(sentencepiece_file), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Transformer Engine" not in done.stderr
    assert "out/train.bin, .idx: 2 documents, " in done.stdout and "dropped: nothing" in done.stdout
    assert [document[0] for document in documents_of(tmp_path / "out" / "train")] == [1, 1]


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("preprocess_data", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_the_options_that_megatron_s_users_type(tmp_path: Path) -> None:
    needed = ["--input", "a", "--output-prefix", "b", "--tokenizer", "c"]

    def parsed(*options: str) -> tuple[str, bool]:
        tool = load_tool()
        found = tool.build_parser().parse_args([*needed, "--record", "text", *options])
        settings = record_settings(tool.record_options(found), found.input, found.format)
        assert isinstance(settings, TextSettings)
        return settings.key, settings.append_eod

    assert parsed() == ("text", True) == parsed("--append-eod")
    assert parsed("--json-keys", "body", "--no-append-eod") == ("body", False)
    assert parsed("--json-key", "body") == parsed("--text-key", "body") == ("body", True)


def test_every_format_gives_the_same_tokens(sentencepiece_file: Path, corpus: list[str], tmp_path: Path) -> None:
    lines = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in corpus).encode()
    cells = io.StringIO(newline="")
    csv.writer(cells).writerows([("text", "id"), *((text, 1) for text in corpus)])
    zstd = pyarrow.Codec("zstd")
    for name, data in {
        "a.jsonl": lines,
        "b.jsonl.gz": gzip.compress(lines),
        "c.ndjson.zst": zstd.compress(lines, asbytes=True),
        "d.csv": cells.getvalue().encode(),
        "e.csv.zst": zstd.compress(cells.getvalue().encode(), asbytes=True),
    }.items():
        (tmp_path / name).write_bytes(data)
    pyarrow.parquet.write_table(pyarrow.table({"text": corpus}), tmp_path / "f.parquet")
    folder = tmp_path / "g"
    folder.mkdir()
    for number, text in enumerate(corpus):
        (folder / f"{number}.txt.gz").write_bytes(gzip.compress(text.encode()))
    written = []
    for path in sorted(tmp_path.glob("*")):
        preprocess([str(path)], tmp_path / "out" / path.name, sentencepiece_file)
        written.append([(tmp_path / "out" / f"{path.name}.{ending}").read_bytes() for ending in ("bin", "idx")])
    assert len(written) == 7 and written == [written[0]] * 7
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    assert documents_of(tmp_path / "out" / "f.parquet") == [[*reference.encode(text), 2] for text in corpus]


def test_the_bar_is_for_terminals_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def shown() -> str:
        with InputBar(1000) as bar:
            bar.update(500, 12345)
        return capsys.readouterr().err

    assert shown() == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    bar = shown()
    assert "0.5/1.0 kB" in bar and "tokens/s" in bar


def test_the_tool_s_errors_are_one_line_and_status_2(
    sentencepiece_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = load_tool()
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
        ("in.jsonl", f"error: {tmp_path}/in.jsonl:2: not JSON: "),
        ("missing.jsonl", f"error: --input {tmp_path}/missing.jsonl: no such file"),
    ]:
        status, error = run(source)
        assert status == 2 and error.startswith(line)
    assert listing(tmp_path) == ["empty.jsonl", "in.jsonl"]
