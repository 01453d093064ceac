"""Write JSON, CSV, parquet, Arrow or text files as token files (.bin/.idx), or `inspect` such: see --help."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if find_spec("megakd") is None:
    # A clone that is not installed.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megakd.common.errors import UserError

if TYPE_CHECKING:
    from megakd.data.record_kind import RecordOptions

EPILOG = """Text becomes [bos] text eos. Conversations, and prompts with responses, become examples, with a mask of what
the assistant wrote in PREFIX.mask.bin and .idx. The files grow in a folder .NAME.partial beside the output and appear
when they are complete: PREFIX.bin and PREFIX.idx (megatron-core's format), PREFIX.json and PREFIX.vocab.json.gz (the
tokenizer's fingerprint, by which training checks that the teacher reads the same ids), and PREFIX.skipped.jsonl where
anything was left out. After an interruption the same command goes on after the last input file that was finished.
`preprocess_data.py inspect PREFIX` prints documents with what counts of them marked. docs/data.md tells more."""


def build_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders (walked, sorted; also those of datasets.save_to_disk) or glob patterns",
    )
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="output path without .bin/.idx")
    parser.add_argument(
        "--tokenizer", required=True, metavar="PATH", help="Hugging Face folder (the teacher's) or sentencepiece .model"
    )
    parser.add_argument(
        "--text-key",
        "--json-key",
        "--json-keys",
        metavar="KEY",
        help="key (JSON) or column (CSV, parquet, Arrow) of the text (default: text)",
    )
    _add_examples(parser)
    parser.add_argument(
        "--format",
        choices=("auto", "jsonl", "json", "csv", "parquet", "arrow", "text"),
        default="auto",
        help="auto (default): by what is inside, and the ending .csv; jsonl: an object on each line; json: an array of "
        "objects, or one after another; text: each file is one document, whatever it looks like. gzip and zstd are "
        "unpacked",
    )
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="end each text, and each response behind its prompt, with the eos token (default: yes)",
    )
    parser.add_argument("--prepend-bos", action="store_true", help="begin with the bos token")
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="at a record that cannot be used, or a damaged file: stop (default), or skip, count and list it",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that encode (default: 1)")
    parser.add_argument("--overwrite", action="store_true", help="begin anew and replace an existing output")
    return parser


def _add_examples(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("conversations and instructions")
    group.add_argument(
        "--record",
        choices=("auto", "text", "messages", "sharegpt", "prompt", "alpaca"),
        default="auto",
        help="what a record is; auto (default): by the keys of the first one. sharegpt: conversations of from and "
        "value; alpaca: instruction, input and output",
    )
    group.add_argument(
        "--messages-key", metavar="KEY", help="key of the list of messages (default: messages, or conversations)"
    )
    group.add_argument("--tools-key", metavar="KEY", help="key of the tools, if any (default: tools)")
    group.add_argument("--prompt-key", metavar="KEY", help="key of the prompt (default: prompt)")
    group.add_argument("--response-key", metavar="KEY", help="key of the response (default: response)")
    group.add_argument("--system-key", metavar="KEY", help="key of the system text, if any (default: system)")
    group.add_argument(
        "--prompt-template",
        metavar="TEXT",
        help="what stands before the response, with {prompt} and perhaps {system} in it (default: {prompt})",
    )
    group.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="make a chat of [system,] prompt and response, and render it with the chat template",
    )
    group.add_argument(
        "--chat-template", metavar="FILE", help="a jinja file in place of the tokenizer's own chat template"
    )
    group.add_argument(
        "--template-argument",
        action="append",
        metavar="NAME=VALUE",
        help="a variable of the chat template, such as enable_thinking=false; may be repeated, and a record's own "
        "chat_template_kwargs come first",
    )
    group.add_argument("--tools", metavar="FILE", help="a JSON file with the tools of conversations that name none")


def record_options(options: argparse.Namespace) -> RecordOptions:
    """Those of the options that say what a record is."""
    from megakd.data.record_kind import RecordOptions

    given = {name: getattr(options, name) for name in RecordOptions.__dataclass_fields__}
    given["record"] = None if options.record == "auto" else options.record
    return RecordOptions(**given)


def build_inspect_parser() -> argparse.ArgumentParser:
    """The options of `inspect`."""
    parser = argparse.ArgumentParser(
        prog="preprocess_data.py inspect",
        description="Print documents of a data set, with special tokens, and what counts of examples marked: in "
        "colour on a terminal, else between \u27e6 and \u27e7 (\u27e61: in turns before the last).",
    )
    parser.add_argument("prefix", metavar="PREFIX", help="path of the data set without .bin/.idx")
    parser.add_argument("--start", type=int, default=0, metavar="I", help="first document, from 0 (default: 0)")
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="how many documents (default: 3)")
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the one that PREFIX.json names")
    return parser


def inspect(arguments: list[str]) -> int:
    """Run `inspect`; 0 on success, 2 with an error line on bad input."""
    options = build_inspect_parser().parse_args(arguments)
    from megakd.data.inspection import inspect_tokens

    try:
        inspect_tokens(options.prefix, options.tokenizer, start=options.start, samples=options.samples)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader, such as head, has seen enough; nothing may be written at the end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 on success, 2 with an error line on bad input, 130 or 143 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # megatron-core warns on import about kernels that reading and writing token files never use.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    if arguments[:1] == ["inspect"]:
        return inspect(arguments[1:])
    options = build_parser().parse_args(arguments)
    from megakd.data.preprocess import preprocess
    from megakd.data.record_kind import record_settings

    try:
        settings = record_settings(record_options(options), options.input, options.format)
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
