"""The teacher's own ranks through a run: the student's windows in their order, ahead of it, until it ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from megakd.common.watchdog import Watchdog
from megakd.config.layouts import (
    student_ranks,
    teacher_micro_batch_size,
    teacher_parallel,
    windows_per_step,
)
from megakd.config.schema import Config
from megakd.config.wording import ranks_per_replica
from megakd.data.batches import Batch, EvaluationBatches, TrainBatches
from megakd.parallel.mesh import GroupPool
from megakd.parallel.pieces import Window
from megakd.parallel.random_state import seed_megatron
from megakd.platform import Joint, Platform, communication_timeout, detect_accelerations, resolve_layer_spec
from megakd.teacher.turns import Task
from megakd.training.build import build_mesh, build_teacher_server
from megakd.training.held_out import (
    check_samples,
    checks_teacher_after,
    checks_teacher_first,
    evaluates_after,
    evaluation_window,
)
from megakd.training.train_data import HeldOutData, held_out_sources, open_held_out_data, open_train_data

_Turn = tuple[Sequence[Batch], Window]


class TeacherSide:
    """The objects of a teacher on ranks of its own. On each of them; all methods are collective over them."""

    def __init__(self, config: Config, platform: Platform, watchdog: Watchdog, joint: Joint) -> None:
        assert config.teacher is not None
        self.config, self.platform, self.watchdog, self.joint = config, platform, watchdog, joint
        layer_spec = resolve_layer_spec(config.run.layer_spec, detect_accelerations())
        pool = GroupPool(communication_timeout(config.safeguards.hang_timeout_seconds))
        self.mesh = build_mesh(teacher_parallel(config), pool)
        seed_megatron(config.run.seed, self.mesh)  # megatron-core asks for its random state, dropout or not
        self.server = build_teacher_server(config, joint, self.mesh, layer_spec, watchdog.beat)
        self._data = open_train_data(config)
        self._held_out: HeldOutData | None = None
        if held_out_sources(config, config.evaluation.split) is not None:
            self._held_out = open_held_out_data(config, config.evaluation.split)
        self._students = student_ranks(config, joint.size)
        self._check_samples = check_samples(config, self._data, self._held_out)

    def serve(self) -> None:
        """Compute what the student asks for, until it ends."""
        self.watchdog.enter("waiting for the student", waits=True)
        task = self.server.turns.task()
        if task.evaluates_only:
            assert self._held_out is not None, "checked at the start"
            self._serve(self._evaluation(self._held_out), task.first_step)
        else:
            self._serve_steps(task)
        self.watchdog.enter("waiting for the student to end", waits=True)
        self.server.turns.leave()

    def _serve_steps(self, task: Task) -> None:
        if not self._serve(self._before(task), task.first_step):
            return
        batches = self._train_batches() if self.config.distill.kd_weight > 0 else None
        try:
            for step in range(task.first_step, task.steps):
                if batches is not None:
                    self.watchdog.enter("reading data", step + 1)
                    if not self._serve(self._training(batches.microbatches(step)), step + 1):
                        return
                    self.server.turns.step_done(step)
                if not self._serve(self._after(step + 1, task), step + 1):
                    return
        finally:
            if batches is not None:
                batches.close()

    def _train_batches(self) -> TrainBatches:
        """The teacher's own microbatches of each step."""
        return TrainBatches(
            self._data.samples,
            self._data.order,
            micro_batch_size=teacher_micro_batch_size(self.config),
            global_batch_size=self.config.data.global_batch_size,
            data_parallel_rank=self.mesh.dp_rank,
            data_parallel_size=self.mesh.dp_size,
            device=self.platform.device,
        )

    def _serve(self, turns: Iterator[_Turn], step: int) -> bool:
        """Compute and send windows; False where the student has ended."""
        for microbatches, window in turns:
            self.watchdog.enter("waiting for the student", step, waits=True)
            if not self.server.may_compute(microbatches, window):
                return False
            self.watchdog.enter("computing the teacher", step)
            self.server.compute(microbatches, window)
        return True

    def _training(self, microbatches: list[Batch]) -> Iterator[_Turn]:
        """The windows of a step, from the teacher's own microbatches of it."""
        data = self.config.data
        count = windows_per_step(self.config, self._students)
        each = len(microbatches) // count
        window = Window(data.global_batch_size // count, data.sequence_length, self._data.samples.has_segments)
        return ((microbatches[start : start + each], window) for start in range(0, len(microbatches), each))

    def _before(self, task: Task) -> Iterator[_Turn]:
        """The windows before the first step."""
        if self.config.evaluation.at_start and task.first_step == 0:
            assert self._held_out is not None, "checked at the start"
            return self._evaluation(self._held_out)
        due = task.is_checked and checks_teacher_first(self.config, task.first_step, task.steps)
        return self._check() if due else iter(())

    def _after(self, step: int, task: Task) -> Iterator[_Turn]:
        """The windows between a step, counted from 1, and the next."""
        if evaluates_after(step, task.steps, self.config.evaluation):
            assert self._held_out is not None, "checked at the start"
            return self._evaluation(self._held_out)
        due = task.is_checked and checks_teacher_after(step, task.steps, self.config, self._students)
        return self._check() if due else iter(())

    def _check(self) -> Iterator[_Turn]:
        """The window that the teacher is measured on by itself."""
        return islice(self._evaluation(self._check_samples, window=1), 1)

    def _evaluation(self, data: HeldOutData, window: int | None = None) -> Iterator[_Turn]:
        """The windows, of so many of the student's microbatches, that it goes through when it is measured."""
        config, samples = self.config, data.samples
        own = EvaluationBatches(
            samples,
            data.ids,
            micro_batch_size=teacher_micro_batch_size(config),
            data_parallel_rank=self.mesh.dp_rank,
            data_parallel_size=self.mesh.dp_size,
            max_tokens=config.evaluation.max_tokens,
            device=self.platform.device,
        )
        unit = config.data.micro_batch_size * (self._students // ranks_per_replica(config.parallel))
        stop = -(-own.num_samples // unit) * unit
        size = (window or evaluation_window(config, self._students)) * unit
        for first in range(0, stop, size):
            last = min(first + size, stop)
            of_samples = Window(last - first, samples.sequence_length, samples.has_segments)
            yield list(own.between(first, last)), of_samples
