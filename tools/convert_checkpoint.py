"""Convert models between Hugging Face folders and Megatron checkpoints: import, export, verify, inspect."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

if find_spec("megakd") is None:
    # A clone that is not installed.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megakd.common.errors import UserError
from megakd.common.logging import configure_logging

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SHOWN = 10
Begin = Callable[[int], Callable[[int], None]]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print the usage before it."""
        raise UserError(f"{message.rstrip('.')}. {self.prog} --help tells more.")


def build_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = _Parser(description=__doc__, epilog="COMMAND --help tells more.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    into = commands.add_parser("import", help="Hugging Face folder to Megatron checkpoint", description=(
        "Write a Hugging Face folder as a megatron-core distributed checkpoint, which loads under any TP x PP. "
        "config.json and the tokenizer go beside it."
    ))  # fmt: skip
    into.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder")
    into.add_argument("--tp", type=_positive, default=1, metavar="N", help="tensor-parallel size it is meant for (1)")
    into.add_argument("--pp", type=_positive, default=1, metavar="N", help="pipeline-parallel size it is meant for (1)")

    back = commands.add_parser("export", help="Megatron checkpoint to Hugging Face folder", description=(
        "Write a megatron-core distributed checkpoint as a folder that transformers loads."
    ))  # fmt: skip
    back.add_argument("--megatron", required=True, metavar="DIR", help="Megatron checkpoint")
    back.add_argument(
        "--hf-config", metavar="DIR", help="folder with config.json and tokenizer, where none are beside the checkpoint"
    )
    for writer in (into, back):
        writer.add_argument(
            "--out", required=True, metavar="DIR", help="folder to write; it appears when it is complete"
        )
        writer.add_argument("--dtype", choices=DTYPES, help="type of the weights written (default: as they are)")
        writer.add_argument("--overwrite", action="store_true", help="replace an earlier conversion")

    verify = commands.add_parser("verify", help="compare both", description=(
        "Compare every weight bit for bit and the logits of both on the same tokens. Exit status 1 where they differ."
    ))  # fmt: skip
    verify.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder")
    verify.add_argument("--megatron", required=True, metavar="DIR", help="Megatron checkpoint")
    verify.add_argument(
        "--tolerance", type=_tolerance, default=0.0, metavar="X", help="largest difference of a weight (0: every bit)"
    )
    verify.add_argument(
        "--logits-tolerance",
        type=_tolerance,
        default=1e-4,
        metavar="X",
        help="largest difference of a logit in fp32 (1e-4)",
    )
    verify.add_argument(
        "--weights-only", action="store_true", help="leave out the logits, which need both models in memory"
    )

    look = commands.add_parser("inspect", help="tell what a folder holds", description="Tell what a folder holds.")
    look.add_argument("dir", metavar="DIR", help="Hugging Face folder or Megatron checkpoint")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 on success, 1 where `verify` finds a difference, 2 with an error line, 130 when interrupted."""
    configure_logging()
    handler = signal.signal(signal.SIGTERM, _interrupt)
    try:
        options = build_parser().parse_args(arguments)
        return {"import": _import, "export": _export, "verify": _verify, "inspect": _inspect}[options.command](options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"interrupted: {str(interrupt) or 'nothing was written'}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, handler)


def _import(options: argparse.Namespace) -> int:
    from megakd.convert.importing import import_checkpoint

    with _outcome_told(options.out) as watched:
        with _bar("import") as begin:
            import_checkpoint(
                options.hf, options.out, tp=options.tp, pp=options.pp, dtype=_dtype(options.dtype),
                overwrite=options.overwrite, begin=watched(begin),
            )  # fmt: skip
        print(f"Megatron checkpoint: {options.out}")
        return 0


def _export(options: argparse.Namespace) -> int:
    from megakd.convert.exporting import export_checkpoint

    with _outcome_told(options.out) as watched:
        with _bar("export") as begin:
            export_checkpoint(
                options.megatron, options.out, config_dir=options.hf_config, dtype=_dtype(options.dtype),
                overwrite=options.overwrite, begin=watched(begin),
            )  # fmt: skip
        print(f"Hugging Face folder: {options.out}")
        return 0


def _verify(options: argparse.Namespace) -> int:
    from megakd.convert.verifying import (
        compare_weights,
        describe_tokens,
        logits_difference,
        open_both,
        random_tokens,
        stored_bytes,
    )

    hf, megatron = open_both(options.hf, options.megatron)
    with hf, megatron, _bar("compare") as begin:
        differences = compare_weights(hf, megatron, begin(stored_bytes(hf)))
    different = [d for d in differences if d.different]
    retyped = sum(d.retyped for d in differences)
    equal = "have equal values" if retyped else "are equal bit for bit"
    print(
        f"{len(differences) - len(different)} of {len(differences)} parameters {equal}"
        + (f"; {retyped} are stored as another type" if retyped else "")
    )
    for difference in different[:SHOWN]:
        print(
            f"  {difference.name}: {difference.different:,} of {difference.elements:,} elements differ, by at most "
            f"{difference.largest:.3e}"
        )
    broken = [d for d in differences if any(d.not_finite)]
    for difference in broken[:SHOWN]:
        print(
            f"  {difference.name}: of {difference.elements:,} elements {difference.not_finite[0]:,} in {options.hf} "
            f"and {difference.not_finite[1]:,} in {options.megatron} are NaN or infinite"
        )
    failed = any(d.largest > options.tolerance or (options.tolerance == 0 and d.different) for d in different)
    if broken and not options.weights_only:
        print(
            f"logits are not compared: those of a model with {broken[0].name} are not finite; --weights-only leaves "
            "them out"
        )
        print("different" if failed else "not known to be the same")
        return 1
    if not options.weights_only:
        tokens = random_tokens(hf.architecture)
        logits = logits_difference(options.hf, options.megatron, hf.architecture, tokens)
        print(f"logits of {describe_tokens(hf.architecture, tokens)} differ by at most {logits:.3e}")
        failed = failed or not logits <= options.logits_tolerance
    print("different" if failed else "the same within the tolerance" if different else "the same")
    return 1 if failed else 0


def _inspect(options: argparse.Namespace) -> int:
    from megakd.convert.inspecting import describe_model

    print("\n".join(describe_model(options.dir)))
    return 0


@contextmanager
def _outcome_told(out: str) -> Iterator[Callable[[Begin], Begin]]:
    """Make an interrupt say so where it came when the output was in its place already."""
    # Known from when writing begins: an earlier output may be brought back before.
    before: list[tuple[int, int] | None] = []

    def watched(begin: Begin) -> Begin:
        def begin_watched(total: int) -> Callable[[int], None]:
            before.append(_identity(out))
            return begin(total)

        return begin_watched

    try:
        yield watched
    except KeyboardInterrupt:
        if before and _identity(out) not in (None, before[0]):
            raise KeyboardInterrupt(f"{out} was complete already") from None
        raise


def _identity(out: str) -> tuple[int, int] | None:
    try:
        found = os.stat(out)
    except OSError:
        return None
    return found.st_dev, found.st_ino


@contextmanager
def _bar(what: str) -> Iterator[Begin]:
    """A progress bar over bytes, on a terminal's standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    lock = threading.Lock()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def begin(total: int) -> Callable[[int], None]:
            task = progress.add_task(what, total=total)

            def advance(count: int) -> None:
                with lock:
                    progress.advance(task, count)

            return advance

        yield begin


def _dtype(word: str | None):  # type: ignore[no-untyped-def]
    import torch

    return None if word is None else getattr(torch, DTYPES[word])


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    # Nothing is above a tolerance of nan.
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0")
    return value


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    # `inspect DIR | head` ends as it does for other tools.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
