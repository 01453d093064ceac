"""The tool from records to what `inspect` prints of them."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megakd.common.errors import UserError
from megakd.data.inspection import inspect_tokens
from megakd.data.preprocess import write_documents
from megakd.data.tokenizer import load_tokenizer
from tests.data.chat_tokenizers import TEMPLATES, byte_level

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"


def shown(prefix: Path, **options: int | str) -> str:
    out = io.StringIO()
    inspect_tokens(prefix, out=out, **options)  # type: ignore[arg-type]
    return out.getvalue()


@pytest.fixture(scope="module")
def tool() -> Any:
    """The tool as a module, for tests that need no process of its own: megatron-core takes seconds to import."""
    spec = importlib.util.spec_from_file_location("preprocess_data", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("workers", [1, 2])
def test_chats_through_the_tool(tmp_path: Path, workers: int) -> None:
    folder = byte_level(tmp_path / "tokenizer")
    messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "qaré", strict=True)]
    records = [{"messages": messages}, {"messages": [{"role": "user", "content": "<|eot_id|>"}, *messages[1:]]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*records, {"messages": []}]))
    prefix = tmp_path / "out" / "chats"
    done = run(
        *("--input", str(tmp_path / "in.jsonl"), "--output-prefix", str(prefix), "--tokenizer", str(folder)),
        *("--chat-template", str(TEMPLATES / "no_end.jinja"), "--workers", str(workers), "--on-error", "skip"),
    )
    assert done.returncode == 0, done.stderr
    assert "the records are conversations (--record messages)" in done.stderr
    assert "dropped: 1 not a list of messages" in done.stdout
    assert "to know: 2 response without an end-of-turn token, 1 special token's text in the content" in done.stdout
    masks = IndexedDataset(f"{prefix}.mask")
    assert masks[0].dtype == np.uint8
    head, between = len("User: q\nAssistant: "), len("\nUser: r\nAssistant: ")
    assert masks[0].tolist() == [0] * head + [1] + [0] * between + [2, 2, 0]  # é is two tokens
    done = run("inspect", str(prefix))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:6] == [
        "── document 0: 43 tokens, 3 counted (1 in earlier turns, 2 in the response)",
        "User: q",
        "Assistant: ⟦1:a⟧",
        "User: r",
        "Assistant: ⟦é⟧",
    ]
    assert "User: <|eot_id|>\n" in done.stdout


def test_instructions_through_the_tool(tmp_path: Path, tool: Any) -> None:
    folder = byte_level(tmp_path / "tokenizer")
    (tmp_path / "in.csv").write_text("prompt,response,system\nq,r,\n")
    prefix = tmp_path / "out"
    options = ["--input", str(tmp_path / "in.csv"), "--output-prefix", str(prefix), "--tokenizer", str(folder)]
    assert tool.main([*options, "--prompt-template", "Q: {prompt}\nA: "]) == 0
    assert shown(prefix).endswith("document 0: 10 tokens, 2 counted (2 in the response)\nQ: q\nA: ⟦r</s>⟧\n")


def test_text_has_borders_and_special_tokens(sentencepiece_file: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_file)
    write_documents(["one", "two", "three"], tmp_path / "text", tokenizer, prepend_bos=True)
    count = len(tokenizer.encode("two")) + 2
    assert shown(tmp_path / "text", start=1, samples=1).splitlines()[1:] == [
        f"── document 1: {count} tokens",
        "<s>two</s>",
    ]
    assert shown(tmp_path / "text", start=1).count("── document") == 2


def test_colours_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: Any) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    folder = byte_level(tmp_path / "tokenizer")
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "[bold]q", "response": "r"}))
    options = ["--input", str(tmp_path / "in.jsonl"), "--output-prefix", str(tmp_path / "out")]
    assert tool.main([*options, "--tokenizer", str(folder)]) == 0
    out = Terminal()
    inspect_tokens(tmp_path / "out", out=out)
    assert "[bold]q\x1b[1;32mr</s>\x1b[0m" in out.getvalue() and "⟦" not in out.getvalue()


def test_refusals(sentencepiece_file: Path, tmp_path: Path, tool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = tmp_path / "text"
    write_documents(["one"], prefix, load_tokenizer(sentencepiece_file))
    with pytest.raises(UserError, match="--start is 1; .* has documents 0 to 0"):
        shown(prefix, start=1)
    with pytest.raises(UserError, match="--samples is 0"):
        shown(prefix, samples=0)
    (tmp_path / "text.json").unlink()
    with pytest.raises(UserError, match="the tokenizer is not known. Give --tokenizer"):
        shown(prefix)
    assert "one" in shown(prefix, tokenizer_path=str(sentencepiece_file))
    capsys.readouterr()
    assert tool.main(["inspect", str(tmp_path / "nothing"), "--tokenizer", str(sentencepiece_file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: PREFIX is ") and error.count("\n") == 1
