"""Documents to token ids, in this process or in several, always in the order given."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from megakd.common.errors import UserError
from megakd.data.tokenizer import Tokenizer, load_tokenizer

CHUNK_DOCUMENTS = 256
CHUNK_CHARACTERS = 1 << 20

_tokenizer: Tokenizer | None = None  # of a worker process, set once by its initialiser


def encode_documents(documents: Iterable[str], tokenizer: Tokenizer, workers: int = 1) -> Iterator[list[int]]:
    """Yield each document's ids in order.

    With one worker the tokenizer's own threads do the work; with more, that many processes load
    `tokenizer.path` again. Only a few chunks of documents are held at a time.
    """
    if workers < 1:
        raise UserError(f"--workers is {workers}; it must be at least 1.")
    if workers == 1:
        for chunk in _chunks(documents):
            yield from tokenizer.encode_batch(chunk)
        return
    # Forking a process whose tokenizer has threads can deadlock, so the workers start afresh.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(tokenizer.path,))
    pending: deque[Future[list[list[int]]]] = deque()
    try:
        for chunk in _chunks(documents):
            pending.append(executor.submit(_encode_chunk, chunk))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"one of the {workers} encoding processes ended early, perhaps for lack of memory. Use fewer --workers."
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _start_worker(path: str) -> None:
    global _tokenizer
    # One process per core is the parallelism; threads on top would only fight over the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = load_tokenizer(path)


def _encode_chunk(chunk: list[str]) -> list[list[int]]:
    assert _tokenizer is not None, "set by the initialiser"
    return _tokenizer.encode_batch(chunk)


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document)
        if len(chunk) >= CHUNK_DOCUMENTS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
