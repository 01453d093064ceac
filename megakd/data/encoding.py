"""Records to token ids, a chunk at a time, in this process's threads or in several processes, always in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megakd.common.errors import UserError
from megakd.data.records import Encoded, EncoderSettings, Problem, Record, RecordEncoder
from megakd.data.sources import Position, Source
from megakd.data.tokenizer import Tokenizer, load_tokenizer

CHUNK_RECORDS = 1024
CHUNK_CHARACTERS = 1 << 20
CHUNK_ENTRIES = 4096
# While one chunk's last long document is encoded by one core, the next chunk has the others.
THREADS = 2


class Entry(NamedTuple):
    """What was at a place of the input: a record (the chunk's next), a problem, or at line 0 the end of the source."""

    source: int
    line: int
    problem: Problem | None = None


@dataclass
class Chunk:
    """Records to encode in one call, with everything between them; `position` is in bytes of all input."""

    records: list[Record] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    position: int = 0


class Packed(NamedTuple):
    """A chunk's documents, one after another.

    `ids`, `mask` and `weights` (None where all are 1) are [sum of lengths], `lengths` is [documents]; `problems`, and
    the `notes` of documents that have some, are by the record's number.
    """

    ids: NDArray[np.integer[Any]]
    mask: NDArray[np.uint8] | None
    weights: NDArray[np.float32] | None
    lengths: NDArray[np.int32]
    problems: dict[int, Problem]
    notes: dict[int, tuple[str, ...]]


def read_chunks(
    sources: Sequence[Source], fields: Sequence[str], start: int = 0, *, flags: bool = False
) -> Iterator[Chunk]:
    """Yield chunks of the sources from number `start` on; sources that are small share a chunk.

    With `flags` records keep the keys that may flag what of them is to be learnt.
    """
    chunk, characters = Chunk(), 0
    before = sum(source.size for source in sources[:start])
    for number in range(start, len(sources)):
        position = Position()
        for line, value in sources[number].read(fields, position, flags):
            if isinstance(value, Problem):
                chunk.entries.append(Entry(number, line, value))
            else:
                chunk.entries.append(Entry(number, line))
                chunk.records.append(value)
                characters += _characters(value)
            if characters >= CHUNK_CHARACTERS or len(chunk.records) >= CHUNK_RECORDS:
                chunk.position = before + position.tell()
                yield chunk
                chunk, characters = Chunk(), 0
        before += sources[number].size
        chunk.entries.append(Entry(number, 0))
        if len(chunk.entries) >= CHUNK_ENTRIES:
            chunk.position = before
            yield chunk
            chunk, characters = Chunk(), 0
    chunk.position = before
    yield chunk


def encode_chunks(
    chunks: Iterable[Chunk], tokenizer: Tokenizer, settings: EncoderSettings, workers: int = 1
) -> Generator[tuple[Chunk, Packed], None, None]:
    """Yield each chunk with its documents, in order.

    With one worker the tokenizer's own threads do the work; with more, that many processes load `tokenizer.path`
    again. Only a few chunks are held at a time, and they are encoded while the caller uses the ones before.
    Raises UserError where an encoder does or a process dies.
    """
    if workers < 1:
        raise UserError(f"--workers is {workers}; it must be at least 1.")
    encoder = settings.build(tokenizer)  # also for its errors, before any process starts
    executor: Executor
    if workers == 1:
        executor = ThreadPoolExecutor(THREADS, thread_name_prefix="encode")
    else:
        # Forking a process whose tokenizer has threads can deadlock, so the workers start afresh.
        context = multiprocessing.get_context("spawn")
        start = (tokenizer.path, settings)
        executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=start)
    pending: deque[tuple[Chunk, Future[Packed]]] = deque()
    try:
        for chunk in chunks:
            if workers == 1:
                future = executor.submit(encode_records, encoder, chunk.records)
            else:
                future = executor.submit(_encode_in_worker, chunk.records)
            pending.append((chunk, future))
            if len(pending) > 2 * max(workers, THREADS):
                yield _result(*pending.popleft())
        while pending:
            yield _result(*pending.popleft())
    except BrokenProcessPool as error:
        raise UserError(
            f"one of the {workers} encoding processes ended early, perhaps for lack of memory. Use fewer --workers."
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def encode_records(encoder: RecordEncoder, records: Sequence[Record]) -> Packed:
    """Encode records and put their documents together."""
    results = encoder.encode(records)
    documents = [result for result in results if isinstance(result, Encoded)]
    problems = {number: result for number, result in enumerate(results) if isinstance(result, Problem)}
    notes = {n: result.notes for n, result in enumerate(results) if isinstance(result, Encoded) and result.notes}
    assert len(results) == len(records), "one result per record"
    lengths = np.array([len(document.ids) for document in documents], dtype=np.int32)
    if not documents:
        return Packed(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.uint8), None, lengths, problems, notes)
    masks = [document.mask for document in documents if document.mask is not None]
    mask = np.concatenate(masks) if masks else None
    ids = np.concatenate([document.ids for document in documents])
    assert mask is None or len(mask) == len(ids), "every document has a mask of its length, or none has"
    return Packed(ids, mask, _join_weights(documents), lengths, problems, notes)


def _join_weights(documents: Sequence[Encoded]) -> NDArray[np.float32] | None:
    if all(document.weights is None for document in documents):
        return None
    weights = np.concatenate(
        [np.ones(len(one.ids), dtype=np.float32) if one.weights is None else one.weights for one in documents]
    )
    assert len(weights) == sum(len(document.ids) for document in documents), "a weight for each token"
    assert ((weights > 0) & np.isfinite(weights)).all(), "weights are above 0; the mask says what is not learned"
    return weights


_encoder: RecordEncoder | None = None  # of a worker process, built when its first chunk comes
_start: tuple[str, EncoderSettings] | None = None


def _start_worker(path: str, settings: EncoderSettings) -> None:
    global _start
    _start = (path, settings)
    # One process per core is the parallelism; threads on top would only fight over the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # The parent is interrupted too, and tells its workers in its own way.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    # Workers that wait for a parent that was killed would wait for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(records: list[Record]) -> Packed:
    global _encoder
    if _encoder is None:
        # Here and not at the start: an error raised there would be lost.
        assert _start is not None, "set by the initialiser"
        path, settings = _start
        _encoder = settings.build(load_tokenizer(path))
    return encode_records(_encoder, records)


def _result(chunk: Chunk, future: Future[Packed]) -> tuple[Chunk, Packed]:
    return chunk, future.result()


def _characters(value: object) -> int:
    """About how much text there is in a record."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 1
