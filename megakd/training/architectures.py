"""What the configuration says of the models: shapes and folders. Reads config.json files, builds nothing."""

from __future__ import annotations

from pathlib import Path

from megakd.cache.folder import TEACHER
from megakd.common.errors import UserError, naming
from megakd.config.architecture import GPTArchitecture
from megakd.config.schema import Config
from megakd.convert.hf_config import architecture_from_hf
from megakd.data.known_ids import EmbeddingRows


def teacher_folder(config: Config) -> str | None:
    """Where the teacher's config.json and tokenizer are; a cache keeps them, without the weights."""
    if config.teacher is None:
        return None
    return config.teacher.path if config.teacher.source == "online" else str(Path(config.teacher.path) / TEACHER)


def teacher_architecture(config: Config) -> GPTArchitecture:
    """The teacher's shape, from its folder's config.json."""
    folder = teacher_folder(config)
    assert folder is not None
    with naming("teacher.path"):
        return architecture_from_hf(folder)


def student_architecture(config: Config) -> GPTArchitecture:
    """The student's shape: as written, or that of the folder it starts from with the layers that are kept.

    Raises:
        UserError: a kept layer that the folder's model does not have.
    """
    if config.student.architecture is not None:
        return config.student.architecture
    assert config.student.init is not None
    with naming("student.init.path"):
        source = architecture_from_hf(config.student.init.path)
    layers = config.student.init.layers
    if layers is None:
        return source
    for layer in layers:
        if not 0 <= layer < source.num_layers:
            raise UserError(
                f"student.init.layers names layer {layer}; the model in {config.student.init.path} has layers 0 to "
                f"{source.num_layers - 1}."
            )
    return source.model_copy(update={"num_layers": len(layers)})


def shared_vocab_size(config: Config) -> int:
    """Token ids that student and teacher both know: their vocabularies may differ by padding at the end."""
    student = student_architecture(config).vocab_size
    return student if config.teacher is None else min(student, teacher_architecture(config).vocab_size)


def embedding_rows(config: Config) -> list[EmbeddingRows]:
    """How many ids each model knows; every id of the data must be one of each."""
    resize = "Resize its embedding to the tokenizer (resize_token_embeddings in transformers), or"
    rows = student_architecture(config).vocab_size
    if config.student.init is None:
        found = [EmbeddingRows("the student (student.architecture)", rows, "Raise student.architecture.vocab_size.")]
    else:
        name = f"the student (student.init.path: {config.student.init.path})"
        found = [EmbeddingRows(name, rows, f"{resize} start from one that has them.")]
    if config.teacher is not None:
        name = f"the teacher (teacher.path: {config.teacher.path})"
        rows = teacher_architecture(config).vocab_size
        found.append(EmbeddingRows(name, rows, f"{resize} name a teacher that has them."))
    return found


def exported_folder(config: Config) -> Path:
    """Where the run's student goes in Hugging Face format."""
    return Path(config.run.output_dir) / "student"


def source_folder(config: Config) -> str | None:
    """The Hugging Face model whose tokenizer and token ids the student keeps."""
    if config.student.init is not None:
        return config.student.init.path
    return teacher_folder(config)
