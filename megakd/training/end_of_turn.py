"""Whether the exported student will stop where its data and its teacher do; one that does not writes on for ever."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megakd.config.schema import Config
from megakd.convert import generation_end_ids
from megakd.data.examples import Examples
from megakd.data.tokenizer import Tokenizer, has_tokenizer
from megakd.training.architectures import source_folder, student_architecture, teacher_folder
from megakd.training.train_data import is_examples

_EXAMPLES = 100


def find_missing_ends(config: Config, load: Callable[[str | Path], Tokenizer]) -> list[str]:
    """Say at which ids responses or the teacher end, and the student that is exported will not.

    Args:
        load: gives a folder's tokenizer.

    Returns:
        Lines to log, none where the student stops, or is not exported in Hugging Face's format.
    """
    source, teacher = source_folder(config), teacher_folder(config)
    if source is None or not config.run.export:
        return []
    own, file = generation_end_ids(source)
    tokenizer = load(source) if has_tokenizer(source) else None
    known = student_architecture(config).vocab_size
    wanted, lines = list(own), []
    for prefix in _chat_data(config):
        end = response_end(prefix, tokenizer)
        if end is not None and end < known and end not in wanted:
            wanted.append(end)
            what = f"data.train: the responses of {prefix} end with"
            lines.append(_line(what, [end], tokenizer, own, file, wanted))
    if teacher is not None and teacher != source:
        ends, where = generation_end_ids(teacher)
        missing = [end for end in ends if end < known and end not in wanted]
        if missing:
            wanted += missing
            what = f"teacher.path: the teacher ends a text ({where}) with"
            lines.append(_line(what, missing, tokenizer, own, file, wanted))
    return lines


def response_end(prefix: str, tokenizer: Tokenizer | None) -> int | None:
    """The id that most of the first responses of a data set of examples end with; None where there is no such id.

    It is a special token, where those are known. Without one nothing that the student learns ends a text.
    """
    examples = Examples(prefix, "response")
    count = min(len(examples), _EXAMPLES)
    ends: Counter[int] = Counter()
    for number in range(count):
        ids, counted = examples.read(number, slice(None))
        places = np.flatnonzero(counted)
        if len(places):
            ends[int(ids[places[-1]])] += 1
    if not ends:
        return None
    end, times = ends.most_common(1)[0]
    is_special = tokenizer is None or end in tokenizer.special_ids()
    return end if 2 * times >= count and is_special else None


def _chat_data(config: Config) -> Iterator[str]:
    """The training data sets of examples."""
    return (source.path for source in config.data.train if is_examples(source.path, "data.train"))


def _line(
    what: str, ends: Sequence[int], tokenizer: Tokenizer | None, own: Sequence[int], file: Path, wanted: Sequence[int]
) -> str:
    """One line on `ends`, which the student's `file` lacks beside its `own`; `wanted` are all that it should have."""
    pieces = tokenizer.pieces() if tokenizer is not None else []
    named = [f"{end} ({pieces[end]!r})" if end < len(pieces) and pieces[end] else str(end) for end in ends]
    kept = f"is {_shown(own)}" if own else "is not given"
    return (
        f"{what} the id{'s' * (len(ends) > 1)} {', '.join(named)}, where the exported student will not stop: "
        f'eos_token_id {kept} in {file}. Write "eos_token_id": {_shown(wanted)} there before the run.'
    )


def _shown(ids: Sequence[int]) -> str:
    return str(ids[0]) if len(ids) == 1 else str(list(ids))
