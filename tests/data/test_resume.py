"""A run that is ended anywhere leaves no data set, and the next one's result is that of a run without interruption."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megakd.common.errors import UserError
from megakd.data import partial, preprocess
from megakd.data.indexed import TokenStream
from megakd.data.partial import partial_path
from megakd.data.preprocess import write_documents
from megakd.data.text_encoder import TextSettings
from megakd.data.tokenizer import load_tokenizer
from tests.data.ended_run import ended_run

ROOT = Path(__file__).resolve().parents[2]
FILES = 12


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    folder = tmp_path / "in"
    folder.mkdir()
    generator = random.Random(5)
    for number in range(FILES):
        words = [["one", "two", "größer", "", "three four"][generator.randrange(5)] * 20 for _ in range(80)]
        lines = [json.dumps({"text": word * bool(word)}) for word in words]
        lines[7] = "bad"
        (folder / f"{number:02d}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return [str(folder)]


@pytest.fixture(autouse=True)
def commits_at_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "COMMIT_SECONDS", 0)


def run(inputs: list[str], prefix: Path, tokenizer: Path, **options: object) -> preprocess.Summary:
    return preprocess.preprocess(inputs, prefix, tokenizer, **{"on_error": "skip", **options})


def contents(prefix: Path) -> dict[str, bytes]:
    return {path.name.split(".", 1)[1]: path.read_bytes() for path in sorted(prefix.parent.glob(f"{prefix.name}.*"))}


@pytest.fixture
def expected(inputs: list[str], sentencepiece_file: Path, tmp_path: Path) -> dict[str, bytes]:
    run(inputs, tmp_path / "whole" / "train", sentencepiece_file)
    found = contents(tmp_path / "whole" / "train")
    assert list(found) == ["bin", "idx", "json", "skipped.jsonl", "vocab.json.gz"]
    return found


@pytest.mark.parametrize(
    ("step", "how", "workers"),
    [
        ("writer add 0", "SIGKILL", 1),
        ("writer add 7", "SIGKILL", 1),
        ("writer add 7", "SIGTERM", 1),
        ("writer add 12", "SIGINT", 2),
        ("writer add 12", "SIGKILL", 2),
        ("partial finish_source 5", "SIGKILL", 1),
        ("partial _append 4", "SIGKILL", 1),
        ("writer finish 0", "SIGKILL", 1),
        ("partial complete 0", "SIGKILL", 1),
        ("partial publish 0", "SIGINT", 1),
        ("os replace 0", "SIGKILL", 1),
        ("os replace 2", "SIGKILL", 1),
        ("os replace 4", "SIGTERM", 1),
        ("partial remove 0", "SIGKILL", 1),
    ],
)
def test_a_killed_run_goes_on(
    inputs: list[str],
    sentencepiece_file: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    step: str,
    how: str,
    workers: int,
) -> None:
    prefix = tmp_path / "out" / "train"
    options = ["--input", *inputs, "--output-prefix", str(prefix), "--tokenizer", str(sentencepiece_file)]
    options += ["--on-error", "skip", "--workers", str(workers)]
    status = ended_run(options, tmp_path / "stderr", step=step, how=how)
    said = (tmp_path / "stderr").read_text()
    assert status == {"SIGKILL": -9, "SIGINT": 130, "SIGTERM": 143}[how], said
    if how != "SIGKILL":
        assert said.endswith("interrupted: no data set was written; the same command goes on with it\n")
        assert "Traceback" not in said
    if step == "partial remove 0":
        assert contents(prefix) == expected
        with pytest.raises(UserError, match="Use --overwrite"):
            run(inputs, prefix, sentencepiece_file)
        return
    assert not Path(f"{prefix}.idx").exists()
    run(inputs, prefix, sentencepiece_file)
    assert contents(prefix) == expected
    assert not partial_path(prefix).exists()


def test_a_stopped_run_goes_on_after_the_finished_files(
    inputs: list[str], sentencepiece_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = sorted(Path(inputs[0]).iterdir())
    for file in bad:
        file.write_text(file.read_text().replace("bad", '{"text": "good"}'))
    run(inputs, tmp_path / "whole" / "train", sentencepiece_file)
    corrected = bad[8].read_text()
    bad[8].write_text(corrected.replace('{"text": "good"}', "bad"))
    prefix = tmp_path / "out" / "train"
    for _ in range(2):
        with pytest.raises(UserError, match=r"08.jsonl:8: not JSON.* 8 of 12 files are done; the same command goes on"):
            run(inputs, prefix, sentencepiece_file, on_error="stop")
    assert capsys.readouterr().err == "going on after 8 of 12 files\n"
    assert contents(prefix) == {}
    bad[8].write_text(corrected)
    summary = run(inputs, prefix, sentencepiece_file, on_error="stop", workers=2)
    assert contents(prefix) == contents(tmp_path / "whole" / "train")
    assert summary.tokens == TokenStream(prefix).num_tokens


@pytest.fixture
def begun(inputs: list[str], sentencepiece_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The prefix of a run that was ended with everything read."""

    def interrupt(self: partial.Partial, state: partial.State) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(partial.Partial, "complete", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(inputs, tmp_path / "out" / "train", sentencepiece_file)
    return tmp_path / "out" / "train"


def test_what_is_refused_and_what_begins_anew(
    begun: Path, inputs: list[str], sentencepiece_file: Path, hugging_face_folder: Path, expected: dict[str, bytes]
) -> None:
    def refused(message: str, tokenizer: Path = sentencepiece_file, **options: object) -> None:
        with pytest.raises(UserError, match=rf"\.train\.partial is .*; it {message}.*use --overwrite to begin anew"):
            run(inputs, begun, tokenizer, **options)

    refused("was begun with another tokenizer", hugging_face_folder)
    refused("was begun with another encoder", settings=TextSettings(append_eod=False))
    refused("was begun with --on-error skip, and has skipped lines", on_error="stop")
    refused(r"has read .*00.jsonl, which is not there or not the same", format="text")
    file = Path(inputs[0], "03.jsonl")
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    refused(r"has read .*03.jsonl, which is not there or not the same")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    Path(inputs[0], "11.jsonl").rename(begun.parent / "11.jsonl")
    refused(r"has read .*11.jsonl, which is not there or not the same")
    run(inputs, begun, sentencepiece_file, overwrite=True)
    assert contents(begun) != expected and TokenStream(begun).num_tokens > 0
    (begun.parent / "11.jsonl").rename(Path(inputs[0], "11.jsonl"))
    run(inputs, begun, sentencepiece_file, overwrite=True)
    assert contents(begun) == expected


def test_a_torn_journal_line_is_not_believed(
    begun: Path, inputs: list[str], sentencepiece_file: Path, expected: dict[str, bytes]
) -> None:
    journal = partial_path(begun) / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:4]) + lines[4][:-5])
    with (partial_path(begun) / "data.bin").open("ab") as file:
        file.write(b"behind the journal")
    run(inputs, begun, sentencepiece_file)
    assert contents(begun) == expected


def test_a_journal_that_knows_no_ids_gives_no_largest_one(
    inputs: list[str], begun: Path, sentencepiece_file: Path, expected: dict[str, bytes]
) -> None:
    """One of an older version: the largest of the ids that are still to come may not be the largest of all."""
    journal = partial_path(begun) / "journal.jsonl"
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    for entry in entries:
        del entry["state"]["max_id"]
    journal.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries[:4]))
    run(inputs, begun, sentencepiece_file)
    found = json.loads(contents(begun)["json"])
    whole = json.loads(expected["json"])
    assert whole.pop("max_id") > 0 and found == whole


def test_two_runs_do_not_write_one_output(sentencepiece_file: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_file)

    def documents() -> Iterator[str]:
        yield "one"
        for overwrite in (False, True):
            with pytest.raises(UserError, match=r"another run is writing .*\.train\.partial"):
                write_documents(["other"], tmp_path / "train", tokenizer, overwrite=overwrite)
        yield "two"

    write_documents(documents(), tmp_path / "train", tokenizer)
    assert TokenStream(tmp_path / "train").num_documents == 2


@pytest.mark.parametrize("share", [0.1, 0.6, 0.99])
def test_a_full_disk_is_one_line_and_the_run_goes_on(
    inputs: list[str], sentencepiece_file: Path, tmp_path: Path, expected: dict[str, bytes], share: float
) -> None:
    prefix = tmp_path / "out" / "train"
    options = ["--input", *inputs, "--output-prefix", str(prefix), "--tokenizer", str(sentencepiece_file)]
    options += ["--on-error", "skip"]
    status = ended_run(options, tmp_path / "stderr", file_size=int(share * len(expected["bin"])))
    said = (tmp_path / "stderr").read_text()
    lines = [line for line in said.splitlines() if not line.startswith("skipped ")]
    assert status == 2 and len(lines) == 1, said
    assert lines[0].startswith(f"error: {prefix} cannot be written: File too large. Make room")
    assert contents(prefix) == {}
    run(inputs, prefix, sentencepiece_file)
    assert contents(prefix) == expected


def test_workers_end_with_a_parent_that_is_killed(sentencepiece_file: Path, tmp_path: Path) -> None:
    child = textwrap.dedent("""
        import multiprocessing, os, signal, sys
        from megakd.data.encoding import Chunk, Entry, encode_chunks
        from megakd.data.text_encoder import TextSettings
        from megakd.data.tokenizer import load_tokenizer
        chunks = (Chunk([{"text": "one"}], [Entry(0, 1)]) for _ in range(100))
        results = encode_chunks(chunks, load_tokenizer(sys.argv[1]), TextSettings(), 2)
        next(results)
        print(*(process.pid for process in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    command = [sys.executable, "-c", child, str(sentencepiece_file)]
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=300)
    workers = [int(pid) for pid in ended.stdout.split()]
    assert ended.returncode == -9 and workers
    deadline = time.monotonic() + 60
    while any(_is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker is left"
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
