"""Write JSONL, CSV, parquet or text files as token files (.bin/.idx) for training: see --help."""

from __future__ import annotations

import argparse
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

if find_spec("megakd") is None:
    # A clone that is not installed.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megakd.common.errors import UserError

EPILOG = """Each document becomes [bos] text eos. The files grow in a folder .NAME.partial beside the output and appear
when they are complete: PREFIX.bin and PREFIX.idx (megatron-core's format), PREFIX.json and PREFIX.vocab.json.gz (the
tokenizer's fingerprint, by which training checks that the teacher reads the same ids), and PREFIX.skipped.jsonl where
anything was left out. After an interruption the same command goes on after the last input file that was finished.
docs/data.md tells more."""


def build_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="files, folders (walked, sorted) or glob patterns"
    )
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="output path without .bin/.idx")
    parser.add_argument(
        "--tokenizer", required=True, metavar="PATH", help="Hugging Face folder (the teacher's) or sentencepiece .model"
    )
    parser.add_argument(
        "--text-key",
        "--json-key",
        "--json-keys",
        default="text",
        metavar="KEY",
        help="key (JSONL) or column (CSV, parquet) of the text (default: text)",
    )
    parser.add_argument(
        "--format",
        choices=("auto", "jsonl", "csv", "parquet", "text"),
        default="auto",
        help="auto (default): by the ending .jsonl, .ndjson, .csv or .parquet; a file of any other is one document. "
        ".gz and .zst may follow, except .parquet",
    )
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the eos token (default: yes)",
    )
    parser.add_argument("--prepend-bos", action="store_true", help="begin each document with the bos token")
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="at a record that cannot be used, or a damaged file: stop (default), or skip, count and list it",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that encode (default: 1)")
    parser.add_argument("--overwrite", action="store_true", help="begin anew and replace an existing output")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 on success, 2 with an error line on bad input, 130 or 143 when interrupted."""
    options = build_parser().parse_args(arguments)
    # megatron-core warns on import about kernels that reading and writing token files never use.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    from megakd.data.preprocess import preprocess
    from megakd.data.text_encoder import TextSettings

    settings = TextSettings(options.text_key, append_eod=options.append_eod, prepend_bos=options.prepend_bos)
    try:
        with _terminated_like_interrupted():
            summary = preprocess(
                options.input,
                options.output_prefix,
                options.tokenizer,
                settings,
                format=options.format,
                workers=options.workers,
                on_error=options.on_error,
                overwrite=options.overwrite,
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print("interrupted: no data set was written; the same command goes on with it", file=sys.stderr)
        return 128 + (interruption.args[0] if interruption.args else signal.SIGINT)
    print("\n".join(summary.lines()))
    return 0


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM, a scheduler's way to end a job, ends as Ctrl-C does: what is finished is made durable."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
