"""Whether the models know the data's ids, and mean by them what the data does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from megakd.common.logging import log
from megakd.config.schema import Config
from megakd.data.fingerprint import ModelTokenizer, check_same_tokenizer
from megakd.data.known_ids import check_ids
from megakd.data.tokenizer import load_tokenizer
from megakd.training.architectures import embedding_rows, source_folder, teacher_folder
from megakd.training.end_of_turn import find_missing_ends


def check_vocabulary(config: Config, keys: Sequence[str], *, with_student: bool = True) -> None:
    """Hold data sets against the models' tokenizers and embeddings; what else is to be known is logged.

    Args:
        keys: of the data section, those whose data sets are read.
        with_student: the student's tokenizer counts, which it keeps; a cache is the teacher's alone.

    Raises:
        UserError: a tokenizer gives other ids, or a model has no row for one.
    """
    load = cache(load_tokenizer)
    sources = [(f"data.{key}", source.path) for key in keys for source in getattr(config.data, key) or ()]
    models = model_tokenizers(config) if with_student else model_tokenizers(config)[:1]
    lines = [line for key, prefix in sources for line in check_same_tokenizer(prefix, models, key=key, load=load)]
    rows = embedding_rows(config)
    for key, prefix in sources:
        check_ids(prefix, rows, key=key)
    if with_student:
        lines += find_missing_ends(config, load)
    for line in dict.fromkeys(lines):
        log.warning(line)


def model_tokenizers(config: Config) -> list[ModelTokenizer]:
    """The models whose tokenizers must be the data's, the teacher first.

    The teacher reads these ids, and the student is exported with its own folder's tokenizer.
    """
    teacher, student = teacher_folder(config), source_folder(config)
    found = [] if teacher is None else [ModelTokenizer("teacher", "teacher.path", teacher)]
    if student is not None and student != teacher:
        found.append(ModelTokenizer("student", "student.init.path", student))
    return found
