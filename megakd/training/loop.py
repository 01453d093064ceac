"""The training loop: one for every teacher and layout."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megakd.checkpoint.run_state import (
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    set_aside_checkpoints,
)
from megakd.common.errors import UserError
from megakd.common.logging import configure_logging, log
from megakd.config.schema import Config
from megakd.data.batches import TrainBatches
from megakd.evaluation import Scores, evaluate
from megakd.parallel.random_state import seed_megatron
from megakd.parameters.sharding import padded_vocab_size
from megakd.platform import Platform, build_platform, detect_accelerations, init_distributed, resolve_layer_spec
from megakd.teacher import OnlineTeacher, Teacher
from megakd.training.architectures import shared_vocab_size, student_architecture, teacher_architecture
from megakd.training.build import (
    DTYPES,
    Student,
    build_adam,
    build_cached_teacher,
    build_meshes,
    build_student,
    build_teacher,
)
from megakd.training.export import export_student, parameters_gathered
from megakd.training.flops import step_flops
from megakd.training.held_out import held_out_batches
from megakd.training.metrics import MetricsWriter, describe_scores
from megakd.training.objective import Objective, describe_loss
from megakd.training.preflight import preflight
from megakd.training.run_folder import save_run_description
from megakd.training.schedule import learning_rate
from megakd.training.step import StepResult, train_step
from megakd.training.train_data import held_out_sources, open_held_out_data, open_train_data, run_steps


@dataclass(frozen=True)
class DistillResult:
    """What a run leaves behind: its folder, the exported student, the held-out scores by step."""

    folder: Path
    exported: Path | None
    scores: dict[int, Scores]


def distill(config: Config, *, preflighted: bool = False) -> DistillResult:
    """Train the student that `config` describes. Call it on every rank of a torchrun job, or in one process.

    Initialises torch.distributed where the caller has not. Goes on from the run folder's newest checkpoint, if any.
    `preflighted` says that `training.preflight` has passed already, as it has under launch.sh.

    Raises:
        UserError: the configuration or a file it names cannot be used; the message says what to change.
    """
    return _start(config, preflighted).train()


def evaluate_run(config: Config, *, preflighted: bool = False) -> Scores:
    """Measure on held-out data: the run's newest checkpoint, or the student it would start from. On every rank.

    Raises:
        UserError: as `distill`, or no held-out data is named.
    """
    split = config.evaluation.split
    if held_out_sources(config, split) is None:
        raise UserError(f"evaluation needs held-out data; set data.{split} or data.{split}_fraction.")
    return _start(config, preflighted).evaluate_only()


def _start(config: Config, preflighted: bool) -> _Run:
    platform = build_platform()
    init_distributed(platform)
    configure_logging(dist.get_rank())
    if not preflighted:
        _preflight_once(config)
    return _Run(config, platform)


def _preflight_once(config: Config) -> None:
    """Check on rank 0, since it reads tokenizers, and raise what it finds on every rank."""
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            preflight(config, dist.get_world_size())
        except UserError as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise UserError(problem[0])


class _Run:
    """The objects of a run and the few numbers that change: step and tokens seen."""

    def __init__(self, config: Config, platform: Platform) -> None:
        self.config, self.platform = config, platform
        self.folder = Path(config.run.output_dir)
        accelerations = detect_accelerations()
        layer_spec = resolve_layer_spec(config.run.layer_spec, accelerations)
        mesh, teacher_mesh = build_meshes(config)
        self.mesh = mesh
        log.info(accelerations.describe())
        seed_megatron(config.run.seed, mesh)
        self.student: Student = build_student(config, mesh, layer_spec)
        self.optimizer = build_adam(self.student, config.optimizer, DTYPES[config.run.dtype])
        self.data = open_train_data(config)
        self.teacher: OnlineTeacher | None = None
        if teacher_mesh is not None:
            self.teacher = build_teacher(config, teacher_mesh, layer_spec)
        self.cached_teacher = build_cached_teacher(config, self.data)
        # A run on cross-entropy alone has a teacher only to be measured against.
        self.training_teacher: Teacher | None = self.cached_teacher
        if config.distill.kd_weight > 0 and self.teacher is not None:
            self.training_teacher = self.teacher
        self.objective = Objective(
            config.distill, shared_vocab_size(config), mesh.groups.tp, self.student.sequence_parallel
        )
        self.held_out = None
        if held_out_sources(config, config.evaluation.split) is not None:
            self.held_out = open_held_out_data(config, config.evaluation.split)
        self.steps = run_steps(config, self.data)
        self.step, self.tokens = 0, 0
        self.scores: dict[int, Scores] = {}
        self._announce(layer_spec)

    def train(self) -> DistillResult:
        """Run from the newest checkpoint, or the start, to the end."""
        config, is_writer = self.config, dist.get_rank() == 0
        self._resume()
        if is_writer:
            save_run_description(self.folder, config, dist.get_world_size(), self.mesh.describe())
        batches = TrainBatches(
            self.data.samples,
            self.data.order,
            micro_batch_size=config.data.micro_batch_size,
            global_batch_size=config.data.global_batch_size,
            data_parallel_rank=self.mesh.dp_rank,
            data_parallel_size=self.mesh.dp_size,
            device=self.platform.device,
            attach=None if self.cached_teacher is None or not self.mesh.is_last_stage else self.cached_teacher.attach,
        )
        metrics = MetricsWriter(
            self.folder,
            is_writer=is_writer,
            start_step=self.step,
            total_steps=self.steps,
            log_interval=config.logging.log_interval,
            tensorboard=config.logging.tensorboard,
        )
        try:
            with metrics:
                if config.evaluation.at_start and self.step == 0:
                    self._evaluate(metrics)
                while self.step < self.steps:
                    self._train_step(batches, metrics)
        finally:
            batches.close()
        exported = self._export() if config.run.export else None
        return DistillResult(self.folder, exported, self.scores)

    def evaluate_only(self) -> Scores:
        """Score the newest checkpoint's weights, or the initial ones; writes nothing."""
        newest = latest_checkpoint(self.folder / "checkpoints") if self.config.checkpoint.resume else None
        if newest is not None:
            self.step = load_checkpoint(newest, self.student.model, None, self.mesh)["step"]
        log.info(f"evaluating {newest if newest is not None else 'the initial student'}")
        scores = self._scores()
        log.info(describe_scores(self.step, scores.to_dict()))
        return scores

    def _train_step(self, batches: TrainBatches, metrics: MetricsWriter) -> None:
        config = self.config
        rate = learning_rate(self.step, self.steps, config.optimizer, config.schedule)
        started = time.perf_counter()
        microbatches = batches.microbatches(self.step)
        waited = time.perf_counter() - started
        result = train_step(
            self.student, self.training_teacher, self.objective, self.optimizer, microbatches, rate, self.platform
        )
        self.step += 1
        self.tokens += result.tokens
        metrics.step(self._record(result, rate) | {"data_share": waited / (waited + result.seconds)})
        last = self.step == self.steps
        every = config.evaluation.interval
        if (every and self.step % every == 0) or (last and config.evaluation.at_end):
            self._evaluate(metrics)
        every = config.checkpoint.save_interval
        if (every and self.step % every == 0) or (last and config.checkpoint.save_at_end):
            self._save()

    def _record(self, result: StepResult, rate: float) -> dict[str, Any]:
        config = self.config
        tokens = config.data.global_batch_size * config.data.sequence_length
        runs_teacher = self.training_teacher is not None and self.cached_teacher is None
        teacher = teacher_architecture(config) if runs_teacher else None
        flops = step_flops(self.student.architecture, teacher, config.data.sequence_length, tokens)
        return {
            "step": self.step,
            "loss": result.loss,
            "kd_loss": result.kd_loss,
            "ce_loss": result.ce_loss,
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "tokens": self.tokens,
            "tokens_per_second": tokens / result.seconds,
            "tflops_per_rank": flops / result.seconds / dist.get_world_size() / 1e12,
            "teacher_share": result.teacher_seconds / result.seconds,
            "step_seconds": result.seconds,
            "peak_memory_bytes": self.platform.peak_memory_bytes(),
        }

    def _scores(self) -> Scores:
        assert self.held_out is not None, "checked at the start"
        return evaluate(
            self.student.model,
            self.mesh,
            held_out_batches(self.config, self.held_out, self.mesh, self.platform.device),
            self.teacher,
            vocab_size=self.objective.vocab_size,
            chunk_mib=self.config.distill.loss_chunk_mib,
            sequence_parallel=self.student.sequence_parallel,
        )

    def _evaluate(self, metrics: MetricsWriter) -> None:
        scores = self.scores[self.step] = self._scores()
        metrics.evaluation(self.step, scores.to_dict())

    def _save(self) -> None:
        with parameters_gathered(self.student.model):
            path = save_checkpoint(
                self.folder / "checkpoints",
                self.step,
                self.student.model,
                self.optimizer,
                self.mesh,
                {"step": self.step, "tokens": self.tokens, **self._order()},
            )
        log.info(f"checkpoint {path}")

    def _resume(self) -> None:
        checkpoints = self.folder / "checkpoints"
        if not self.config.checkpoint.resume:
            # Left in place, an earlier run's checkpoints would be taken for this one's by the next resume.
            set_aside_checkpoints(checkpoints)
            return
        newest = latest_checkpoint(checkpoints)
        if newest is None:
            return
        counters = load_checkpoint(newest, self.student.model, self.optimizer, self.mesh)
        self.step, self.tokens = counters["step"], counters["tokens"]
        log.info(f"resumed from {newest} after {self.step} steps")
        for key, value in self._order().items():
            if counters[key] != value:
                log.warning(
                    f"{key} was {counters[key]} when {newest} was written and is {value} now: samples of this epoch "
                    "are seen twice or not at all"
                )
        if self.step > self.steps:
            raise UserError(
                f"{newest} is from step {self.step}, and this run ends at step {self.steps}. Make the run longer, "
                "set checkpoint.resume=false to start over, or give another run.output_dir."
            )

    def _order(self) -> dict[str, Any]:
        """What, beside the data itself, decides which samples a step sees."""
        data = self.config.data
        return {
            "run.seed": self.config.run.seed,
            "data.global_batch_size": data.global_batch_size,
            "data.sequence_length": data.sequence_length,
            "samples": [[len(share.ids), share.count] for share in self.data.order.shares],
        }

    def _export(self) -> Path:
        path = export_student(self.config, self.student)
        log.info(f"student in Hugging Face format: {path}")
        return path

    def _announce(self, layer_spec: str) -> None:
        config = self.config
        student = student_architecture(config)
        log.info(
            f"{config.run.name}: student of {student.num_layers} layers, {student.num_parameters():,} parameters "
            f"({config.run.dtype}, {layer_spec} layers) on {self.mesh.describe()}"
        )
        if self.cached_teacher is not None:
            for line in self.cached_teacher.describe():
                log.info(line)
        elif config.teacher is not None:
            teacher = teacher_architecture(config)
            use = "" if self.training_teacher is not None else ", for evaluation only"
            log.info(
                f"teacher {config.teacher.path}: {teacher.num_layers} layers, {teacher.num_parameters():,} "
                f"parameters{use}"
            )
        columns = padded_vocab_size(student.vocab_size, config.student.make_vocab_size_divisible_by)
        log.info(
            describe_loss(
                config.distill,
                config.data.micro_batch_size * config.data.sequence_length,
                columns // config.parallel.tensor_model_parallel_size,
                self.platform.device.type,
            )
        )
        for line in (*self.data.lines, *(self.held_out.lines if self.held_out is not None else ())):
            log.info(line)
        log.info(
            f"{self.steps:,} steps of {config.data.global_batch_size * config.data.sequence_length:,} tokens from "
            f"{self.data.order.num_samples:,} samples"
        )
