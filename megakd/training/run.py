"""A run from its newest checkpoint, or the start, to its end or a wish to stop."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megakd.checkpoint.folders import checkpoint_steps
from megakd.checkpoint.record import Record
from megakd.checkpoint.run_checkpoints import RunCheckpoints
from megakd.common.errors import UserError
from megakd.common.launch_time import launch_age_seconds, restart_count
from megakd.common.logging import log
from megakd.common.step_parts import DATA
from megakd.common.stop_request import Interruption, stop_requested
from megakd.common.watchdog import Watchdog
from megakd.config.schema import Config
from megakd.data.batches import TrainBatches
from megakd.evaluation import Scores, evaluate
from megakd.job.flops import step_flops
from megakd.parallel.random_state import seed_megatron
from megakd.parallel.rank_0 import on_rank_0
from megakd.platform import Joint, Platform, detect_accelerations, resolve_layer_spec
from megakd.teacher import DenseTeacher, Teacher
from megakd.teacher.turns import StudentTurns, Task, TeacherTimes
from megakd.training.announce import announce
from megakd.training.architectures import shared_vocab_size, teacher_architecture
from megakd.training.boards import open_boards
from megakd.training.build import (
    DTYPES,
    Student,
    build_adam,
    build_cached_teacher,
    build_meshes,
    build_remote_teacher,
    build_student,
    build_teacher,
)
from megakd.training.drift import TEACHER_CONTENTS, check_changes, describe_contents, find_changes
from megakd.training.export import export_student, parameters_gathered
from megakd.training.held_out import (
    check_samples,
    checks_teacher_after,
    checks_teacher_first,
    evaluates_after,
    evaluation_window,
    held_out_batches,
)
from megakd.training.metrics import MetricsWriter, describe_scores
from megakd.training.objective import Objective
from megakd.training.profiling import StepProfiler
from megakd.training.run_folder import CHECKPOINTS, save_run_description
from megakd.training.schedule import learning_rate
from megakd.training.step import StepResult, train_step
from megakd.training.step_record import step_record
from megakd.training.teacher_check import TeacherCheck, build_teacher_check
from megakd.training.timing import RankTimes, time_student
from megakd.training.train_data import held_out_sources, open_held_out_data, open_train_data, run_steps
from megakd.training.watch import Best, Counters


class Run:
    """The objects of a run and the numbers that change. On every rank; all methods are collective."""

    def __init__(
        self,
        config: Config,
        platform: Platform,
        watchdog: Watchdog,
        joint: Joint | None = None,
        *,
        accept_changes: bool,
    ) -> None:
        self.config, self.platform, self.watchdog = config, platform, watchdog
        self.folder = Path(config.run.output_dir)
        self.scores: dict[int, Scores] = {}
        accelerations = detect_accelerations()
        layer_spec = resolve_layer_spec(config.run.layer_spec, accelerations)
        self.mesh, teacher_mesh = build_meshes(config)
        log.info(accelerations.describe())
        seed_megatron(config.run.seed, self.mesh)
        self._student: Student = build_student(config, self.mesh, layer_spec)
        self._optimizer = build_adam(self._student, config.optimizer, DTYPES[config.run.dtype])
        self._data = open_train_data(config)
        self._ranks = dist.get_world_size() if joint is None else joint.size
        self._teacher: DenseTeacher | None = None
        self._turns: StudentTurns | None = None
        if joint is not None:
            self._teacher = remote = build_remote_teacher(config, joint, self.mesh)
            self._turns = remote.turns
        elif teacher_mesh is not None:
            self._teacher = build_teacher(config, teacher_mesh, self.mesh, layer_spec)
        self._cached_teacher = build_cached_teacher(config, self._data)
        # A run on cross-entropy alone has a teacher only to be measured against.
        self._training_teacher: Teacher | None = self._cached_teacher
        if config.distill.kd_weight > 0 and self._teacher is not None:
            self._training_teacher = self._teacher
        self._clock = platform.step_clock()
        time_student(self._student, self._clock)
        self._rank_times = RankTimes(self.mesh, platform)
        self._objective = Objective(
            config.distill, shared_vocab_size(config), self.mesh.groups.tp, self._student.sequence_parallel,
            clock=self._clock,
        )  # fmt: skip
        self._held_out = None
        if held_out_sources(config, config.evaluation.split) is not None:
            self._held_out = open_held_out_data(config, config.evaluation.split)
        self._steps = run_steps(config, self._data)
        computes = self._training_teacher is not None and self._cached_teacher is None
        self._step_flops = step_flops(
            self._student.architecture,
            teacher_architecture(config) if computes else None,
            config.data.sequence_length,
            config.data.global_batch_size * config.data.sequence_length,
        )
        self._accept_changes = accept_changes
        self._contents = on_rank_0(lambda: describe_contents(config, self._data))
        self._teacher_check: TeacherCheck | None = None
        if self._teacher is not None:
            self._teacher_check = build_teacher_check(
                config, self._teacher, self._student, check_samples(config, self._data, self._held_out),
                self._contents[TEACHER_CONTENTS], layer_spec,
            )  # fmt: skip
        self._checkpoints = RunCheckpoints(
            self.folder / CHECKPOINTS,
            self._student.model,
            self._optimizer,
            self.mesh,
            keep_last=config.checkpoint.keep_last,
            in_background=config.checkpoint.async_save,
        )
        self._counters = Counters()
        self._saved_step: int | None = None
        self._metrics: MetricsWriter
        for line in announce(
            config, self._data, self._held_out, self._cached_teacher, layout=self.mesh.describe(),
            layer_spec=layer_spec, steps=self._steps, device_type=platform.device.type,
            world_size=self._ranks,
        ):  # fmt: skip
            log.info(line)

    def train(self) -> Interruption | None:
        """Train on. Returns what interrupted it, with all saved that could be; None at the run's end.

        Raises:
            UserError: there is no way on: steps without finite losses, a disk that fails, a checkpoint of another run.
        """
        config, is_writer = self.config, dist.get_rank() == 0
        self.watchdog.enter("resuming")
        self._resume()
        if is_writer:
            save_run_description(self.folder, config, self._ranks, self.mesh.describe(), self._steps)
        cached = self._cached_teacher if self.mesh.is_last_stage else None
        batches = TrainBatches(
            self._data.samples,
            self._data.order,
            micro_batch_size=config.data.micro_batch_size,
            global_batch_size=config.data.global_batch_size,
            data_parallel_rank=self.mesh.dp_rank,
            data_parallel_size=self.mesh.dp_size,
            device=self.platform.device,
            attach=None if cached is None else cached.attach,
        )
        self._metrics = MetricsWriter(
            self.folder,
            is_writer=is_writer,
            start_step=self._counters.step,
            total_steps=self._steps,
            log_interval=config.logging.log_interval,
            boards=open_boards(config, self.folder, self._counters.step) if is_writer else (),
        )
        if self._turns is not None:
            self._turns.start(Task(self._counters.step, self._steps, is_checked=True))
        profiler = StepProfiler(config.logging.profile, self.folder, dist.get_rank(), self.platform, self._clock)
        try:
            with self._metrics:
                if config.evaluation.at_start and self._counters.step == 0:
                    self._evaluate()
                elif checks_teacher_first(config, self._counters.step, self._steps):
                    self._check_teacher()
                interrupted = self._agree()
                while interrupted is None and not self._is_over():
                    profiler.before(self._counters.step + 1)
                    self._train_step(batches)
                    profiler.after(self._counters.step)
                    interrupted = self._agree()
                if interrupted is not None and self._is_over():
                    interrupted = None  # nothing is left to be done but the export
                self.watchdog.enter("finishing a checkpoint")
                self._heed(self._checkpoints.finish())
                if interrupted is not None and self._saved_step != self._counters.step > 0:
                    self._save(waits=True)
                self._end_teacher()
        finally:
            profiler.close()
            batches.close()
        return Interruption(interrupted, self._outlook()) if interrupted is not None else None

    def _outlook(self) -> str:
        if not on_rank_0(lambda: bool(checkpoint_steps(self._checkpoints.folder))):
            return "before the first checkpoint; the same command starts anew"
        if not self.config.checkpoint.resume:
            return "after a checkpoint; the same command starts anew (checkpoint.resume is false)"
        return "after a checkpoint; the same command goes on from it"

    def evaluate_only(self) -> Scores:
        """Score the newest checkpoint's weights, or the initial ones; writes nothing."""
        self.watchdog.enter("resuming")
        newest = self._checkpoints.newest() if self.config.checkpoint.resume else None
        if newest is not None:
            path, record = newest
            self._check_drift(path, record)
            self._checkpoints.load_model(path)
            self._counters.step = record.step
        log.info(f"evaluating {newest[0] if newest is not None else 'the initial student'}")
        if self._turns is not None:
            self._turns.start(Task(self._counters.step, self._counters.step, evaluates_only=True))
        scores = self._scores()
        self._end_teacher()
        log.info(describe_scores(self._counters.step, scores.to_dict()))
        return scores

    def _end_teacher(self) -> None:
        """Let a teacher on ranks of its own go."""
        self.watchdog.enter("letting the teacher go")
        if self._turns is not None:
            self._turns.end()

    def export(self) -> Path:
        """Write the student as a Hugging Face folder."""
        self.watchdog.enter("the export")
        path = export_student(self.config, self._student)
        log.info(f"student in Hugging Face format: {path}")
        return path

    def _is_over(self) -> bool:
        patience, best = self.config.evaluation.patience, self._counters.best
        return self._counters.step >= self._steps or (patience is not None and best.since >= patience)

    def _train_step(self, batches: TrainBatches) -> None:
        config, counters = self.config, self._counters
        self.watchdog.enter("reading data", counters.step + 1)
        rate = learning_rate(counters.step, self._steps, config.optimizer, config.schedule)
        self._clock.start()
        with self._clock.during(DATA):
            microbatches = batches.microbatches(counters.step)
        self.watchdog.enter("computing")
        result = train_step(
            self._student, self._training_teacher, self._objective, self._optimizer, microbatches, rate, self.platform,
            self._clock, None if config.teacher is None else config.teacher.signal_window,
        )  # fmt: skip
        times = self._rank_times.gather(self._clock.stop())
        counters.step += 1
        counters.tokens += result.tokens
        odd = self._judge(result, batches)
        record = step_record(
            config, result, times, step=counters.step, tokens=counters.tokens, learning_rate=rate,
            flops=self._step_flops, ranks=self._ranks, teacher_times=self._teacher_times(),
        )  # fmt: skip
        self._metrics.step(record | odd)
        if self._metrics.is_told(counters.step):
            self._metrics.step_times(self._rank_times.take(counters.step))
        if counters.skipped_in_a_row >= config.safeguards.max_skipped_steps:
            self._heed(self._checkpoints.finish())
            raise UserError(
                f"{counters.skipped_in_a_row} steps in a row had a loss or gradients that are not finite "
                f"(safeguards.max_skipped_steps), up to step {counters.step}; the weights are those of the last good "
                f"step, and the checkpoints before are kept. Look at the samples in {self.folder / 'metrics.jsonl'}, "
                "lower optimizer.lr or leave out the data. If the newest checkpoint is of just before, remove it to "
                "go on from the one before it."
            )
        best = evaluates_after(counters.step, self._steps, config.evaluation) and self._evaluate()
        if checks_teacher_after(counters.step, self._steps, config, dist.get_world_size()):
            self._check_teacher()
        over = self._is_over()
        every = config.checkpoint.save_interval
        if counters.skipped_in_a_row and not over:
            return  # what the next step shows to be bad must not take the place of what is good
        if best or (every and counters.step % every == 0) or (over and config.checkpoint.save_at_end):
            self._save()

    def _judge(self, result: StepResult, batches: TrainBatches) -> dict[str, Any]:
        """Count and report a step that was skipped or whose loss jumps. Returns what its record says of it."""
        counters, deviations = self._counters, self.config.safeguards.loss_spike_deviations
        mean = counters.spikes.mean
        if result.skipped:
            counters.skipped_steps += 1
            counters.skipped_in_a_row += 1
            also = " and a gradient is not finite" if math.isfinite(result.loss) else ""
            text = f"is skipped: its loss is {result.loss:g}{also}"
        else:
            counters.skipped_in_a_row = 0
            if self._saved_step is not None:
                counters.proven_step = self._saved_step
            if not counters.spikes.is_spike(result.loss, deviations):
                return {"skipped_steps": counters.skipped_steps}
            text = f"is a loss spike: {result.loss:.4f} where the recent mean is {mean:.4f}"
        ids = batches.sample_ids(counters.step - 1)
        log.warning(f"step {counters.step} {text}; samples {_shortened(ids)}")
        event = "skipped" if result.skipped else "loss_spike"
        return {"skipped_steps": counters.skipped_steps, event: True, "sample_ids": ids}

    def _teacher_times(self) -> TeacherTimes | None:
        """Where a teacher on ranks of its own left the time of the step that was just done; on rank 0."""
        if self._turns is None or self._training_teacher is None:
            return None
        return self._turns.teacher_times(self._counters.step - 1)

    def _agree(self) -> str | None:
        """Between steps: name a checkpoint that all ranks have written; what any rank wants to stop for."""
        self.watchdog.enter("agreeing with the other ranks")
        limit = self.config.run.time_limit_minutes
        is_late = limit is not None and launch_age_seconds() > 60 * limit
        signal_name = stop_requested()
        if signal_name is None and self._turns is not None:
            signal_name = self._turns.stop_wish()
        is_writing = self._checkpoints.is_saving and not self._checkpoints.is_written
        flags = torch.tensor(
            [signal_name is not None, is_late, is_writing], dtype=torch.int32, device=self.platform.device
        )
        dist.all_reduce(flags)
        stopped, late, writing = flags.tolist()
        if self._checkpoints.is_saving and not writing:
            self._heed(self._checkpoints.finish())
        if stopped:
            return signal_name or "a signal to another rank"
        return f"run.time_limit_minutes {limit:g}" if late else None

    def _check_teacher(self) -> None:
        """Measure the teacher by itself, if there is one that computes."""
        if self._teacher_check is not None:
            self.watchdog.enter("checking the teacher")
            self._teacher_check.run()
            self._judge_teacher(self._teacher_check)

    def _judge_teacher(self, check: TeacherCheck) -> None:
        """Stop where the teacher is not what it was; a checkpoint that is being written is finished first."""
        try:
            self._counters.teacher = check.judge(self._counters.teacher, self._counters.step)
        except UserError:  # on every rank, since all have one figure
            self._heed(self._checkpoints.finish())
            raise

    def _scores(self) -> Scores:
        assert self._held_out is not None, "checked at the start"
        self.watchdog.enter("evaluating")
        return evaluate(
            self._student.model,
            self.mesh,
            self.watchdog.beats(held_out_batches(self.config, self._held_out, self.mesh, self.platform.device)),
            self._teacher_check or self._teacher,
            vocab_size=self._objective.vocab_size,
            chunk_mib=self.config.distill.loss_chunk_mib,
            sequence_parallel=self._student.sequence_parallel,
            window=evaluation_window(self.config, dist.get_world_size()),
        )

    def _evaluate(self) -> bool:
        """Measure; whether it is the best so far by evaluation.metric."""
        step, metric = self._counters.step, self.config.evaluation.metric
        scores = self._scores()
        if self._teacher_check is not None:
            self._judge_teacher(self._teacher_check)
        self.scores[step] = scores
        self._metrics.evaluation(step, scores.to_dict())
        if metric is None or step == 0:
            return False
        value = getattr(scores, metric)
        best = self._counters.best
        best.measure = self._measure()
        if best.take(step, value, larger_is_better=metric == "agreement"):
            return True
        log.info(f"no better {metric} than {best.value:.6g} of step {best.step} in {best.since} evaluations")
        return False

    def _save(self, *, waits: bool = False) -> None:
        self.watchdog.enter("saving a checkpoint")
        counters = self._counters
        if counters.skipped_steps == counters.step:
            # Adam has no state yet, which loading would look for.
            log.info(f"no checkpoint after step {counters.step}: all steps were skipped, and nothing has changed")
            return
        self._heed(self._checkpoints.finish())
        # Records of steps that a checkpoint has must not be lost when a machine is.
        self._metrics.sync()
        if not counters.skipped_in_a_row:
            counters.good_step = counters.step
        record = Record(
            counters.step, counters.to_dict(), self.config.model_dump(mode="json"), self._contents, self._layout
        )
        log.info(f"saving the checkpoint of step {counters.step}")
        kept = [counters.best.steps]
        if counters.skipped_in_a_row:
            kept += [[step] for step in (counters.good_step, counters.proven_step) if step is not None]
        with parameters_gathered(self._student.model):
            problem = self._checkpoints.save(record, kept, waits=waits)
        self._saved_step = counters.step
        self._heed(problem)

    def _heed(self, problem: str | None) -> None:
        """Say that a checkpoint could not be written, and stop if so configured."""
        if problem is None:
            return
        self._saved_step = None
        text = f"a checkpoint could not be written ({problem}); those named before are as they were"
        if self.config.checkpoint.on_write_error == "stop":
            raise UserError(f"{text}. Make room; the same command goes on (checkpoint.on_write_error is stop).")
        log.warning(f"{text}, and training goes on (checkpoint.on_write_error)")

    def _resume(self) -> None:
        if not self.config.checkpoint.resume and not self._was_restarted():
            # Left in place, an earlier run's checkpoints would be taken for this one's by the next resume.
            self._checkpoints.set_aside()
            return
        newest = self._checkpoints.newest()
        self._checkpoints.tidy(newest[0] if newest is not None else None)
        if newest is None:
            return
        path, record = newest
        self._check_drift(path, record)
        if record.step > self._steps:
            raise UserError(
                f"{path} is from step {record.step}, and this run ends at step {self._steps}. Make the run longer, "
                "set checkpoint.resume=false to start over, or give another run.output_dir."
            )
        self._checkpoints.load(path, record, self._layout)
        self._counters = Counters.from_dict(record.counters)
        if self._counters.best.measure not in (None, self._measure()):
            log.info(f"the best by {self._counters.best.measure} is forgotten: evaluation is by {self._measure()} now")
            self._counters.best = Best()
        self._saved_step = record.step
        log.info(f"resumed from {path} after {record.step} steps")

    def _was_restarted(self) -> bool:
        """Whether torchrun started the ranks again and there are checkpoints of theirs: of this launch."""

        def newer_than_the_launch() -> bool:
            times = [path.stat().st_mtime for path in checkpoint_steps(self._checkpoints.folder).values()]
            return max(times, default=-math.inf) >= time.time() - launch_age_seconds()

        return restart_count() > 0 and on_rank_0(newer_than_the_launch)

    def _measure(self) -> str:
        """What `evaluation.metric` is measured on, in words."""
        evaluation, data = self.config.evaluation, self.config.data
        fraction = data.valid_fraction if evaluation.split == "valid" else data.test_fraction
        found = held_out_sources(self.config, evaluation.split)
        places = ", ".join(source.path for source in found[1]) if found is not None else "nothing"
        share = f" ({fraction:g} of it)" if fraction is not None else ""
        tokens = f", {evaluation.max_tokens} tokens" if evaluation.max_tokens is not None else ""
        return f"{evaluation.metric} on {places}{share}{tokens}"

    def _check_drift(self, path: Path, record: Record) -> None:
        changes = find_changes(record, self.config, self._contents)
        check_changes(path, changes, accepted=self._accept_changes)

    @property
    def _layout(self) -> str:
        return f"{dist.get_world_size()} ranks, {self.mesh.describe()}"


def _shortened(ids: list[int]) -> str:
    """A list for the console; metrics.jsonl has all of it."""
    return str(ids) if len(ids) <= 32 else f"{ids[:32]} and {len(ids) - 32} more (metrics.jsonl)"
