#!/usr/bin/env python
"""Preprocessing a JSONL file against the bare Rust tokenizer's `encode_batch` on the same texts in memory, in turn.

The texts are the Python standard library's sources, whole or cut, repeated until they are so many tokens. Both sides
use the same threads: RAYON_NUM_THREADS, or all cores. Every round runs both, in one process.

    python tools/benchmarks/preprocess.py --tokens 10_000_000 --rounds 3
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import measure
from tokenizers import Tokenizer as RustTokenizer

from megakd.data.preprocess import preprocess

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    arguments = _arguments()
    bare = RustTokenizer.from_file(str(arguments.tokenizer / "tokenizer.json"))
    bare.encode_special_tokens = True  # as preprocessing has it: what looks like a special token in text is text
    texts, tokens = _texts(bare, arguments.tokens, arguments.lines)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        source, prefix = Path(folder, f"text.{arguments.format}"), Path(folder, "out")
        _write(source, texts)
        written: list[int] = []

        def whole() -> None:
            options: Any = {"workers": arguments.workers, "overwrite": True}
            written.append(preprocess([str(source)], prefix, arguments.tokenizer, **options).tokens)

        sides = {"preprocess": whole, "encode_batch": lambda: bare.encode_batch(texts, add_special_tokens=False)}
        seconds = measure.interleaved_seconds(sides, arguments.rounds)
        size = source.stat().st_size
    assert set(written) == {tokens + len(texts)}, "every token, and an eos per document"
    result = {
        "machine": measure.machine(),
        "threads": os.environ.get("RAYON_NUM_THREADS", os.cpu_count()),
        "documents": len(texts),
        "tokens": tokens,
        "bytes": size,
        **{f"{side}_tokens_per_second": round(tokens / statistics.median(taken)) for side, taken in seconds.items()},
        "speed_to_encode_batch": measure.median_ratio(seconds["encode_batch"], seconds["preprocess"]),
        "seconds": seconds,
    }
    print(json.dumps(result) if arguments.json else "\n".join(f"{key}: {value}" for key, value in result.items()))


def _texts(bare: RustTokenizer, tokens: int, lines: int | None) -> tuple[list[str], int]:
    """Sources, cut into pieces of ``lines`` lines if given, until they are so many tokens; and how many they are."""
    sources = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in path.parts:
            with contextlib.suppress(UnicodeDecodeError):
                source = path.read_text(encoding="utf-8").splitlines(keepends=True)
                size = lines or max(1, len(source))
                sources += ["".join(source[start : start + size]) for start in range(0, len(source), size)]
    lengths = [len(encoding) for encoding in bare.encode_batch(sources, add_special_tokens=False)]
    texts: list[str] = []
    count = 0
    while count < tokens:
        count += lengths[len(texts) % len(sources)]
        texts.append(sources[len(texts) % len(sources)])
    return texts, count


def _write(path: Path, texts: list[str]) -> None:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
        return
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lines", type=int, help="cut the sources into documents of so many lines (default: whole)")
    parser.add_argument("--workers", type=int, default=1, help="1 (default) uses the tokenizer's threads")
    parser.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "configs" / "quickstart" / "teacher")
    parser.add_argument("--dir", help="where to put the files (default: the system's temporary folder)")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
