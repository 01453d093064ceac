"""Text to token files: records are read, encoded and written to a folder aside until the data set is complete."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megakd.common.errors import UserError
from megakd.data.encoding import Chunk, Packed, encode_chunks, read_chunks
from megakd.data.file_contents import Format
from megakd.data.fingerprint import fingerprint, write_metadata
from megakd.data.indexed import MASK_ENDING, WEIGHT_ENDING
from megakd.data.partial import Partial, check_outputs, output_paths
from megakd.data.progress import InputBar, note
from megakd.data.records import IN_ORDER, MASK_VERSION, MISSING_KEY, UNKNOWN_FLAG, EncoderSettings, Problem
from megakd.data.sources import DocumentsSource, Source, file_sources
from megakd.data.text_encoder import TextSettings
from megakd.data.token_writer import TokenWriter, WeightWriter, lengths_path, token_dtype
from megakd.data.tokenizer import Tokenizer, load_tokenizer

OnError = Literal["skip", "stop"]
SHOWN_PROBLEMS = 20
COMMIT_SECONDS = 1.0  # making files durable takes milliseconds, and a source may be a file of one line


@dataclass(frozen=True)
class Summary:
    """What a run wrote: counts, the longest document in tokens and its place, and what was dropped, by reason.

    `noted` counts documents that were written, by what is worth knowing of them. `seconds` and `tokens_per_second` are
    of this run, where it went on after another.
    """

    prefix: str
    documents: int
    tokens: int
    longest: int
    longest_place: str
    seconds: float
    tokens_per_second: float
    dropped: dict[str, int]
    noted: dict[str, int]

    def lines(self) -> list[str]:
        """The summary as a person reads it."""
        listed = f" (listed in {self.prefix}.skipped.jsonl)" if self.dropped else ""
        unknown = sorted(name for name in self.noted if name.startswith(UNKNOWN_FLAG))
        return [
            f"{self.prefix}.bin, .idx: {self.documents:,} documents, {self.tokens:,} tokens",
            f"longest document {self.longest:,} tokens ({self.longest_place}); "
            f"{self.tokens_per_second:,.0f} tokens/s in {self.seconds:.1f} s",
            f"dropped: {_counts(self.dropped) or 'nothing'}{listed}",
            *([f"to know: {_counts(notes)}"] if (notes := _without(self.noted, unknown)) else []),
            *(f"warning: {self.noted[name]:,} documents have a {name}; nothing was done about it" for name in unknown),
        ]


def preprocess(
    inputs: Sequence[str],
    prefix: str | Path,
    tokenizer_path: str | Path,
    settings: EncoderSettings | None = None,
    *,
    format: Format = "auto",
    workers: int = 1,
    on_error: OnError = "stop",
    overwrite: bool = False,
) -> Summary:
    """Turn files, folders and glob patterns into `<prefix>.bin/.idx`, in the order given, folders sorted.

    Without `settings` every record is a document of text under the key "text". Further as `write_sources`.
    """
    _check_prefix(prefix)
    check_outputs(Path(prefix), overwrite)
    sources = file_sources(inputs, format)
    outputs = {path.resolve() for path in output_paths(Path(prefix))}
    for source in sources:
        if source.path.resolve() in outputs:
            raise UserError(f"{source.path} is an input and an output of this run. Choose another --output-prefix.")
        if on_error == "stop" and source.problem is not None:
            raise _stopped(source.name, 1, source.problem)  # before hours of work on the files before it
    return write_sources(
        sources,
        prefix,
        load_tokenizer(tokenizer_path),
        TextSettings() if settings is None else settings,
        workers=workers,
        on_error=on_error,
        overwrite=overwrite,
    )


def write_documents(
    documents: Iterable[str],
    prefix: str | Path,
    tokenizer: Tokenizer,
    *,
    append_eod: bool = True,
    prepend_bos: bool = False,
    workers: int = 1,
    overwrite: bool = False,
) -> Summary:
    """Write documents held in memory as [bos] + ids + [eos] to `<prefix>.bin/.idx`; further as `write_sources`."""
    settings = TextSettings(append_eod=append_eod, prepend_bos=prepend_bos)
    return write_sources(
        [DocumentsSource(documents)], prefix, tokenizer, settings, workers=workers, overwrite=overwrite
    )


def write_sources(
    sources: Sequence[Source],
    prefix: str | Path,
    tokenizer: Tokenizer,
    settings: EncoderSettings,
    *,
    workers: int = 1,
    on_error: OnError = "stop",
    overwrite: bool = False,
) -> Summary:
    """Write what the sources hold to `<prefix>.bin/.idx`, with the tokenizer's fingerprint beside them.

    The files grow in `.NAME.partial` beside the output and are renamed at the end, the index last: an interrupted run
    leaves no data set, and the same call goes on after the last source that was finished. With `on_error` "skip"
    problems are counted and listed in `<prefix>.skipped.jsonl`, with "stop" the first one, an empty record aside,
    raises UserError with its place. UserError is also raised where no document is left, the tokenizer lacks a token
    that is asked for, the output exists and `overwrite` is False, another run writes it, the folder is of another run
    than this or a file cannot be written.
    """
    _check_prefix(prefix)
    prefix = Path(prefix)
    settings.build(tokenizer)  # for its errors, before anything is written
    job = {"tokenizer": fingerprint(tokenizer), "encoder": [type(settings).__name__, asdict(settings)]}  # type: ignore[call-overload]
    started = time.perf_counter()
    partial: Partial | None = None
    try:
        partial = Partial(prefix, job, sources, overwrite=overwrite, skips=on_error == "skip")
        tokens_before = partial.state.tokens
        if partial.done:
            note(f"going on after {partial.done} of {len(sources)} files")
        if partial.outputs is None:
            _Run(prefix, partial, sources, tokenizer, settings, on_error).run(workers)
        partial.publish()
    except OSError as error:
        what = f"{prefix} cannot be written: {error.strerror or error}. Make room, or choose another --output-prefix."
        raise UserError(what + _kept(partial, sources)) from error
    except UserError as error:
        raise UserError(f"{error}{_kept(partial, sources)}") from error
    finally:
        if partial is not None:
            if not partial.keeps:
                partial.remove()
            partial.close()
    state = partial.state
    seconds = time.perf_counter() - started
    rate = (state.tokens - tokens_before) / max(seconds, 1e-9)
    return Summary(
        str(prefix),
        state.documents,
        state.tokens,
        state.longest,
        state.longest_place,
        seconds,
        rate,
        state.dropped,
        state.noted,
    )


class _Run:
    """Fills the partial folder from where it is."""

    def __init__(
        self,
        prefix: Path,
        partial: Partial,
        sources: Sequence[Source],
        tokenizer: Tokenizer,
        settings: EncoderSettings,
        on_error: OnError,
    ) -> None:
        self._prefix = prefix
        self._partial = partial
        self._sources = sources
        self._tokenizer = tokenizer
        self._settings = settings
        self._on_error = on_error
        self._state = state = partial.state
        self._shown = 0
        at = {"documents": state.documents, "tokens": state.tokens}
        self._tokens = TokenWriter(partial.data, token_dtype(tokenizer.vocab_size), **at)
        mask, weight = (Path(f"{partial.data}{ending}") for ending in (MASK_ENDING, WEIGHT_ENDING))
        self._mask = TokenWriter(mask, np.dtype(np.uint8), **at) if settings.masks else None
        self._weights = WeightWriter(weight, tokens=state.tokens, has_weights=state.has_weights)
        skipped_path = Path(f"{partial.data}.skipped.jsonl")
        if state.skipped_bytes:
            # What an interrupted run wrote behind its last journal line is written again.
            with skipped_path.open("r+b") as file:
                file.truncate(state.skipped_bytes)
        self._skipped: Any = skipped_path.open("ab" if state.skipped_bytes else "wb")

    def run(self, workers: int) -> None:
        try:
            try:
                self._encode(workers)
            except BaseException:
                # Where this fails because the disk is full, what was durable before still is.
                with contextlib.suppress(OSError):
                    self._commit()
                raise
            self._commit()
            if not self._state.documents:
                self._partial.done = 0  # nothing to go on from
                raise UserError(_nothing_left(self._prefix, self._state.dropped))
            self._finish()
        finally:
            for file in (self._tokens, self._mask, self._weights, self._skipped):
                if file is not None:
                    with contextlib.suppress(OSError):
                        file.close()

    def _encode(self, workers: int) -> None:
        settings = self._settings
        chunks = read_chunks(self._sources, settings.fields, self._partial.done, flags=settings.masks)
        committed = time.monotonic()
        with (
            InputBar(sum(source.size for source in self._sources)) as bar,
            contextlib.closing(encode_chunks(chunks, self._tokenizer, self._settings, workers)) as results,
        ):
            for chunk, packed in results:
                self._write(chunk, packed)
                bar.update(chunk.position, len(packed.ids))
                if time.monotonic() - committed >= COMMIT_SECONDS:
                    self._commit()
                    committed = time.monotonic()

    def _write(self, chunk: Chunk, packed: Packed) -> None:
        self._tokens.add(packed.ids, packed.lengths)
        if self._mask is not None:
            assert packed.mask is not None, "settings.masks says that every document has one"
            self._mask.add(packed.mask, packed.lengths)
        self._weights.add(packed.weights, len(packed.ids))
        self._state.has_weights = self._weights.has_weights
        lengths = iter(packed.lengths.tolist())
        state, record = self._state, 0
        if state.max_id is not None and len(packed.ids):
            state.max_id = max(state.max_id, int(packed.ids.max()))
        for source, line, problem in chunk.entries:
            if not line:
                self._partial.finish_source(source, state)
                continue
            notes: tuple[str, ...] = ()
            if problem is None:
                problem, notes, record = packed.problems.get(record), packed.notes.get(record, ()), record + 1
            if problem is not None:
                self._drop(self._sources[source].name, line, problem)
                continue
            length = next(lengths)
            state.documents += 1
            state.tokens += length
            for name in notes:
                state.noted[name] = state.noted.get(name, 0) + 1
            if length > state.longest:
                state.longest, state.longest_place = length, f"{self._sources[source].name}:{line}"

    def _drop(self, name: str, line: int, problem: Problem) -> None:
        if problem not in IN_ORDER:
            if self._on_error == "stop":
                raise _stopped(name, line, problem)
            if self._shown < SHOWN_PROBLEMS:
                note(f"skipped {name}:{line}: {problem}")
            elif self._shown == SHOWN_PROBLEMS:
                note(f"skipped more; {self._prefix}.skipped.jsonl will list all of them")
            self._shown += 1
        detail = {"detail": problem.detail} if problem.detail else {}
        entry = {"file": name, "line": line, "reason": problem.reason, **detail}
        self._state.skipped_bytes += self._skipped.write(json.dumps(entry).encode() + b"\n")
        self._state.dropped[problem.reason] = self._state.dropped.get(problem.reason, 0) + 1

    def _commit(self) -> None:
        masks = [] if self._mask is None else self._mask.files()
        self._partial.commit([*self._tokens.files(), *masks, *self._weights.files(), self._skipped])

    def _finish(self) -> None:
        self._tokens.finish()
        if self._mask is not None:
            self._mask.finish()
        self._weights.finish(lengths_path(self._partial.data))
        self._skipped.close()
        if not self._state.skipped_bytes:
            Path(self._skipped.name).unlink()
        write_metadata(
            self._partial.data,
            self._tokenizer,
            kind="examples" if self._settings.masks else "text",
            documents=self._state.documents,
            tokens=self._state.tokens,
            max_id=self._state.max_id,
            settings=self._settings.metadata() | self._mask_metadata(),
        )
        self._partial.complete(self._state)

    def _mask_metadata(self) -> dict[str, Any]:
        if self._mask is None:
            return {}
        return {"mask_version": MASK_VERSION, "weights": self._state.has_weights}


def _check_prefix(prefix: str | Path) -> None:
    if Path(prefix).name in ("", ".", "..") or str(prefix).endswith("/"):
        raise UserError(f"--output-prefix {prefix} names a folder. Add a name, for example {Path(prefix) / 'train'}.")


def _stopped(name: str, line: int, problem: Problem) -> UserError:
    remedy = problem.remedy or "Correct or remove it"
    if problem.reason == MISSING_KEY and not problem.remedy:
        remedy = (
            "Name the keys that are there (--text-key, --messages-key, --prompt-key and --response-key), correct it"
        )
    return UserError(f"{name}:{line}: {problem}. {remedy}, or leave out what is wrong with --on-error skip.")


def _kept(partial: Partial | None, sources: Sequence[Source]) -> str:
    if partial is None or not partial.keeps:
        return ""
    return f" {partial.done} of {len(sources)} files are done; the same command goes on after them."


def _nothing_left(prefix: Path, dropped: dict[str, int]) -> str:
    return f"no document for {prefix}: the input has {_counts(dropped) or 'none'}. Nothing was written; check --input."


def _without(counts: dict[str, int], names: Sequence[str]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if name not in names}


def _counts(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
