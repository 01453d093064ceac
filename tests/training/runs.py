"""Small runs for tests: models and token files on disk, a configuration over them, and what the loop builds from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PretrainedConfig

from megakd.common.step_parts import STEP_PARTS, seconds_key

SEQUENCE, VOCAB = 16, 300
# Figures of the machine, not of the run.
TIMED = {
    "tokens_per_second", "tflops_per_rank", "teacher_share", "data_share", "step_seconds", "memory_bytes",
    "peak_memory_bytes", "student_wait_share", "teacher_wait_share", *map(seconds_key, STEP_PARTS),
}  # fmt: skip


def save_llama(
    folder: Path,
    *,
    seed: int,
    std: float = 0.1,
    vocab: int = VOCAB,
    kind: type[PretrainedConfig] = LlamaConfig,
    **overrides: Any,
) -> None:
    """A random Llama (or relative) with grouped queries, in Hugging Face format."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": False, "initializer_range": std, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(kind(**(settings | overrides)))
    with torch.no_grad():  # norms that are not all one, so that a forgotten one shows
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def write_tokens(prefix: Path, tokens: np.ndarray, vocab: int = VOCAB, length: int | None = None) -> None:
    """A `.bin/.idx` pair of one document, or of documents of this length."""
    from megakd.data.token_writer import TokenWriter, token_dtype

    writer = TokenWriter(prefix, token_dtype(vocab))
    for start in range(0, len(tokens), length or len(tokens)):
        document = tokens[start : start + (length or len(tokens))]
        writer.add(document, np.array([len(document)], dtype=np.int32))
    writer.finish()


def learnable_tokens(count: int, vocab: int = VOCAB) -> np.ndarray:
    """Tokens of which nine in ten follow from the one before."""
    generator = np.random.default_rng(7)
    table = generator.permutation(vocab)
    stream = np.zeros(count, dtype=np.int64)
    for i in range(1, count):
        stream[i] = table[stream[i - 1] % 16] if generator.random() < 0.9 else generator.integers(vocab)
    return stream


def write_run_files(folder: Path, *, tied: bool = False, experts: bool = False, samples: int = 64) -> Path:
    """Student, teacher and token file under `folder`, which is returned."""
    mixture = {"kind": MixtralConfig, "num_local_experts": 4} if experts else {}
    save_llama(folder / "student", seed=1, tie_word_embeddings=tied, **mixture)
    save_llama(folder / "teacher", seed=2, std=0.2, hidden_size=48, num_hidden_layers=2)
    write_tokens(folder / "data", learnable_tokens(samples * SEQUENCE + 1))
    return folder


def run_values(folder: Path, **settings: Any) -> dict[str, Any]:
    """A configuration over `write_run_files`; settings are `section__key=value`."""
    values: dict[str, Any] = {
        "run": {"output_dir": str(folder / "run"), "layer_spec": "local"},
        "student": {"init": {"path": str(folder / "student")}},
        "teacher": {"path": str(folder / "teacher")},
        "parallel": {},
        "distill": {"kd_weight": 0.5, "ce_weight": 1.0},
        "data": {
            "train": str(folder / "data"), "sequence_length": SEQUENCE, "micro_batch_size": 2, "global_batch_size": 8,
        },
        "optimizer": {"lr": 4e-3},
        "schedule": {"train_steps": 4, "lr_decay_style": "constant"},
        "logging": {"tensorboard": False},
    }  # fmt: skip
    for key, value in settings.items():
        section, name = key.split("__")
        values.setdefault(section, {})[name] = value
    return values


def layout(tp: int = 1, pp: int = 1, **settings: Any) -> dict[str, Any]:
    """Settings of a layout for `run_values`."""
    return {
        "parallel__tensor_model_parallel_size": tp, "parallel__pipeline_model_parallel_size": pp, **settings,
    }  # fmt: skip


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """What a run in `folder`/run logged, without what differs from machine to machine."""
    return [{key: value for key, value in line.items() if key not in TIMED} for line in all_of_records(folder, name)]


def all_of_records(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """What a run in `folder`/run logged."""
    return [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The student that a run in `folder`/run exported."""
    return load_file(folder / "run" / "student" / "model.safetensors")


def run_sides(values: dict[str, Any], action: str = "distill") -> Any:
    """Train or evaluate, inside a pool whose ranks are in two worlds."""
    from megakd.config.load import config_from_dict
    from megakd.training import loop
    from tests import workers

    join, loop._join = loop._join, lambda config, platform: workers.joint()
    try:
        result = getattr(loop, action)(config_from_dict(values))
    finally:
        loop._join = join
    if action == "evaluate_run":
        return None if result is None else result.to_dict()
    return None if result.interrupted is None else result.interrupted.reason


def assert_same_run(found: Path, expected: Path, steps: int) -> None:
    """Both of `steps` steps logged the same and exported the same weights."""
    assert [record["step"] for record in records(found)] == list(range(1, steps + 1))
    assert records(found) == records(expected)
    trained, whole = weights(found), weights(expected)
    assert trained.keys() == whole.keys()
    assert all(torch.equal(trained[key], weight) for key, weight in whole.items())


@dataclass
class Built:
    """The objects of a run."""

    config: Any
    platform: Any
    mesh: Any
    student: Any
    optimizer: Any
    teacher: Any
    objective: Any

    def batches(self) -> Any:
        """The run's training microbatches."""
        from megakd.data.batches import TrainBatches
        from megakd.training.train_data import open_train_data

        data = open_train_data(self.config)
        return TrainBatches(
            data.samples,
            data.order,
            micro_batch_size=self.config.data.micro_batch_size,
            global_batch_size=self.config.data.global_batch_size,
            data_parallel_rank=self.mesh.dp_rank,
            data_parallel_size=self.mesh.dp_size,
            attach=getattr(self.teacher, "attach", None) if self.mesh.is_last_stage else None,
        )

    def train(self, first: int, stop: int) -> list[float]:
        """Losses of steps first..stop."""
        from megakd.training.step import train_step

        batches = self.batches()
        try:
            return [
                train_step(
                    self.student, self.teacher, self.objective, self.optimizer, batches.microbatches(step),
                    self.config.optimizer.lr, self.platform, signal_window=self.signal_window,
                ).loss
                for step in range(first, stop)
            ]  # fmt: skip
        finally:
            batches.close()

    def checkpoints(self, folder: Path, **options: Any) -> Any:
        """The run's checkpoints in a folder."""
        from megakd.checkpoint.run_checkpoints import RunCheckpoints

        return RunCheckpoints(folder, self.student.model, self.optimizer, self.mesh, **options)

    def record(self, step: int, **counters: Any) -> Any:
        """What a checkpoint says of this run."""
        from megakd.checkpoint.record import Record

        return Record(step, counters, self.config.model_dump(mode="json"), {}, self.mesh.describe())

    def save(self, folder: Path, step: int, **counters: Any) -> Path:
        """Write a checkpoint and wait for it."""
        from megakd.training.export import parameters_gathered

        with parameters_gathered(self.student.model):
            assert self.checkpoints(folder).save(self.record(step, **counters)) is None
        return folder / f"step-{step:08d}"

    def load(self, folder: Path) -> dict[str, Any]:
        """Go on from the newest checkpoint; its counters."""
        checkpoints = self.checkpoints(folder)
        path, record = checkpoints.newest()
        checkpoints.load(path, record, self.mesh.describe())
        return dict(record.counters)

    def accumulate(self, microbatches: list[dict[str, torch.Tensor]]) -> list[float]:
        """Fill the gradient buffers; returns the sums of the global batch."""
        from megakd.training.step import accumulate_gradients

        settings = {"signal_window": self.signal_window}
        return accumulate_gradients(self.student, self.teacher, self.objective, microbatches, **settings).tolist()

    @property
    def signal_window(self) -> int | None:
        """The configuration's."""
        return None if self.config.teacher is None else self.config.teacher.signal_window


def serve(values: dict[str, Any]) -> Any:
    """Build a teacher's own side of a run and let it do what the student asks for; the side, when that has ended."""
    from megakd.common.watchdog import Watchdog
    from megakd.config.schema import Config
    from megakd.platform import build_platform
    from megakd.training.teacher_side import TeacherSide
    from tests.workers import joint

    config = Config.model_validate(values)
    shared = joint()
    watchdog = Watchdog(Path(config.run.output_dir), shared.rank, None)
    side = TeacherSide(config, build_platform(), watchdog, shared)
    side.serve()
    return side


def build(values: dict[str, Any]) -> Built:
    """What the loop builds from a configuration; inside a gloo worker, collective over the student's side."""
    from megakd.config.layouts import teacher_is_dedicated
    from megakd.config.schema import Config
    from megakd.parallel.random_state import seed_megatron
    from megakd.platform import build_platform
    from megakd.training.architectures import shared_vocab_size
    from megakd.training.build import (
        DTYPES,
        build_adam,
        build_cached_teacher,
        build_meshes,
        build_remote_teacher,
        build_student,
        build_teacher,
    )
    from megakd.training.objective import Objective
    from megakd.training.train_data import open_train_data
    from tests.workers import joint

    config, platform = Config.model_validate(values), build_platform()
    mesh, teacher_mesh = build_meshes(config)
    seed_megatron(config.run.seed, mesh)
    student = build_student(config, mesh, "local")
    optimizer = build_adam(student, config.optimizer, DTYPES[config.run.dtype])
    teacher: Any = build_cached_teacher(config, open_train_data(config))
    if teacher_mesh is not None:
        teacher = build_teacher(config, teacher_mesh, mesh, "local")
    elif teacher_is_dedicated(config):
        teacher = build_remote_teacher(config, joint(), mesh)
    objective = Objective(config.distill, shared_vocab_size(config), mesh.groups.tp, student.sequence_parallel)
    return Built(config, platform, mesh, student, optimizer, teacher, objective)
