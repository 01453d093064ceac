"""Write JSONL or text files as token files (.bin/.idx) for training: see --help."""

from __future__ import annotations

import argparse
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

if find_spec("megakd") is None:
    # A clone that is not installed.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megakd.common.errors import UserError

EPILOG = """Each document becomes [bos] text eos. Files that are not UTF-8 and documents without tokens are dropped
and counted; a broken JSON line or a missing key stops the run with the file and line. The output appears when it is
complete: PREFIX.bin and PREFIX.idx (megatron-core's format), PREFIX.json and PREFIX.vocab.json.gz (the tokenizer's
fingerprint, by which training checks that the teacher reads the same ids)."""


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
    parser.add_argument("--json-key", default="text", metavar="KEY", help="key of the text in JSONL (default: text)")
    parser.add_argument(
        "--format",
        choices=("auto", "jsonl", "text"),
        default="auto",
        help="auto (default): .jsonl and .ndjson hold a document per line, any other file is one document",
    )
    parser.add_argument("--no-append-eod", action="store_true", help="do not end each document with the eos token")
    parser.add_argument("--prepend-bos", action="store_true", help="begin each document with the bos token")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that encode (default: 1)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 on success, 2 with an error line on bad input, 130 when interrupted."""
    options = build_parser().parse_args(arguments)
    # megatron-core warns on import about kernels that reading and writing token files never use.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    from megakd.data.preprocess import preprocess

    try:
        summary = preprocess(
            options.input,
            options.output_prefix,
            options.tokenizer,
            format=options.format,
            json_key=options.json_key,
            append_eod=not options.no_append_eod,
            prepend_bos=options.prepend_bos,
            workers=options.workers,
            overwrite=options.overwrite,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print("\n".join(summary.lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
