#!/usr/bin/env python
"""Steps with a teacher on a rank of its own against the slower side alone, and on the student's against both in turn.

Two processes of one thread each, one for each side; while one measures alone the other keeps its core busy. All kinds
of steps are run in every round, and ratios are medians over rounds.

Every kind is measured over as many steps in a row, after one or more that are not counted.

    OMP_NUM_THREADS=1 python tools/benchmarks/teacher.py
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import measure
import torch
import torch.distributed as dist
from pair import Batch, Pair, build_pair, platform, random_batches

from megakd.config.architecture import GPTArchitecture
from megakd.config.schema import DistillSection
from megakd.losses import DenseSignal
from megakd.parallel.bridge import Bridge
from megakd.parallel.pieces import Spread, Window
from megakd.platform import Joint, join_sides
from megakd.teacher import OnlineTeacher, RemoteTeacher, TeacherServer, TeacherStage
from megakd.teacher.online import Crossing
from megakd.teacher.parking import ParkedWeights
from megakd.teacher.regrouping import Placement
from megakd.teacher.turns import StudentTurns, Task, TeacherTurns
from megakd.training.objective import Objective
from megakd.training.step import train_step

PREFETCH = (0, 1, 2)


class Side:
    """What either process has: both models, the step's microbatches, and the way to the other process."""

    def __init__(self, arguments: argparse.Namespace, joint: Joint) -> None:
        self.joint, self._phase = joint, 0
        small, large = _shapes(arguments)
        self.pair: Pair = build_pair(small, large, torch.float32)
        self.parked = build_pair(small, large, torch.float32).teacher.model
        self.objective = Objective(DistillSection(), arguments.vocab, self.pair.mesh.groups.tp, sequence_parallel=False)
        self.batches = random_batches(arguments.vocab, arguments.sequence, 1, arguments.samples)
        for number, batch in enumerate(self.batches):
            batch["sample_ids"] = torch.tensor([number])
        # A microbatch size of the teacher's own, so that its states cross as those of any other layout do.
        pairs = zip(self.batches[::2], self.batches[1::2], strict=True)
        self.of_teacher = [{name: torch.cat([one[name], other[name]]) for name in one} for one, other in pairs]
        self.window = Window(arguments.samples, arguments.sequence, one_row=False)
        self.steps = arguments.steps
        self.width = large.hidden_size

    def train(self, teacher: Any) -> None:
        """A step of the student."""
        train_step(
            self.pair.student, teacher, self.objective, self.pair.optimizer, self.batches, 1e-4, platform
        )  # fmt: skip

    def bridge(self, source: int, rank: int) -> Bridge:
        """From the teacher on rank `source` to the student on rank 0."""
        spreads = Spread(((source,),), 2, 1), Spread(((0,),), 1, 1)
        return Bridge(*spreads, rank, width=self.width, dtype=torch.float32, device=platform.device)

    def shared(self) -> dist.Store:
        """Keys that only this phase of both processes has."""
        self._phase += 1
        return dist.PrefixStore(f"phase {self._phase}", self.joint.store)

    def alone(self, whose: bool, function: Callable[[], object]) -> float:
        """Seconds a call, of some in a row, where it is this process's turn; else be busy until they are done."""
        store = self.shared()
        self._meet(store)
        if whose:
            function()  # not counted, as the first steps of a teacher that is ahead are not
            start = time.perf_counter()
            for _ in range(self.steps):
                function()
            seconds = (time.perf_counter() - start) / self.steps
            store.set("done", "")
            return seconds
        matrix = torch.randn(256, 256)
        while not store.check(["done"]):
            for _ in range(20):
                matrix @ matrix
        return 0.0

    def _meet(self, store: dist.Store) -> None:
        if store.add("here", 1) == self.joint.size:
            store.set("all here", "")
        store.wait(["all here"])

    def prefetched(self, lookahead: int) -> float:
        """Seconds a step of the student, with a teacher ahead by so many steps; 0 on the teacher's side."""
        store = self.shared()
        self._meet(store)
        before = lookahead + 1  # nothing is ahead in the first steps, which are not counted
        after = lookahead + 1  # so that the teacher has something to do up to the last one that is
        if self.joint.is_teacher:
            turns = TeacherTurns(store, lookahead * self.window.samples, platform.device)
            server = TeacherServer(self.pair.teacher._stage, self.bridge(1, 1), self.joint.group, turns)
            turns.task()
            for _ in range(before + self.steps + after):
                server.may_compute(self.of_teacher, self.window)
                server.compute(self.of_teacher, self.window)
            turns.leave()
            return 0.0
        asked = StudentTurns(store)
        teacher = RemoteTeacher(self.pair.teacher.head, self.pair.mesh, self.bridge(1, 0), self.joint.group, asked)
        asked.start(Task(0, self.steps))
        for _ in range(before):
            self.train(teacher)
        start = time.perf_counter()
        for _ in range(self.steps):
            self.train(teacher)
        seconds = (time.perf_counter() - start) / self.steps
        for _ in range(after):
            teacher.signals(self.batches)
        asked.end()
        return seconds


class _Known:
    """A teacher that has said all already."""

    def __init__(self, signals: Sequence[DenseSignal | None]) -> None:
        self._signals = signals

    def signals(self, microbatches: Sequence[Batch]) -> Sequence[DenseSignal | None]:
        return self._signals


def _measure(side: Side, rounds: int) -> dict[str, list[float]]:
    """Seconds a step of each kind in every round after the first; zeros where the other side measures."""
    stage, head, is_student = side.pair.teacher._stage, side.pair.teacher.head, not side.joint.is_teacher
    known = _Known(side.pair.teacher.signals(side.batches))
    crossing = Crossing(Placement(side.pair.mesh, 1), Placement(side.pair.mesh, 2), side.bridge(0, 0))
    colocated = OnlineTeacher(stage, head, crossing)
    parked = OnlineTeacher(TeacherStage(side.parked, side.pair.mesh), head, crossing, ParkedWeights(side.parked))

    def in_turn() -> None:
        stage.run(side.of_teacher)
        side.train(known)

    kinds: dict[str, Callable[[], float]] = {
        "student": lambda: side.alone(is_student, lambda: side.train(known)),
        "teacher": lambda: side.alone(not is_student, lambda: stage.run(side.of_teacher)),
        "in turn": lambda: side.alone(is_student, in_turn),
        "colocated": lambda: side.alone(is_student, lambda: side.train(colocated)),
        "offload": lambda: side.alone(is_student, lambda: side.train(parked)),
        **{f"prefetch {n}": partial(side.prefetched, n) for n in PREFETCH},
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds + 1):
        for name, run in kinds.items():
            seconds[name].append(run())
    return {name: values[1:] for name, values in seconds.items()}


def _run(rank: int, port: int, arguments: argparse.Namespace, results: Any) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(minutes=10)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, timeout=timeout)
    joint = join_sides(platform, store, rank=rank, size=2, teacher_ranks=1, timeout=timeout)
    results.put((rank, _measure(Side(arguments, joint), arguments.rounds)))
    joint.store.add("through", 1)
    while rank == 0 and joint.store.add("through", 0) < 2:
        time.sleep(0.1)


def _shapes(arguments: argparse.Namespace) -> tuple[GPTArchitecture, GPTArchitecture]:
    def llama(layers: int, hidden: int) -> GPTArchitecture:
        return GPTArchitecture(
            num_layers=layers, hidden_size=hidden, ffn_hidden_size=hidden * 8 // 3 // 64 * 64,
            vocab_size=arguments.vocab, num_attention_heads=hidden // 64, num_query_groups=hidden // 128,
            kv_channels=64, max_position_embeddings=arguments.sequence,
        )  # fmt: skip

    return llama(arguments.student_layers, arguments.student_hidden), llama(
        arguments.teacher_layers, arguments.teacher_hidden
    )


def main() -> None:
    arguments = _arguments()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = [context.Process(target=_run, args=(rank, port, arguments, results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get() for _ in processes)
    for process in processes:
        process.join()
    seconds = {name: values if any(values) else found[1][name] for name, values in found[0].items()}
    slower = [max(both) for both in zip(seconds["student"], seconds["teacher"], strict=True)]
    result = {
        "machine": measure.machine(),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "to the slower side": {
            f"prefetch {n}": measure.median_ratio(seconds[f"prefetch {n}"], slower) for n in PREFETCH
        },
        "to both in turn": {
            name: measure.median_ratio(seconds[name], seconds["in turn"])
            for name in ("colocated", "offload", "prefetch 0")
        },
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(result["machine"])
    for name, value in result["seconds"].items():  # type: ignore[attr-defined]
        print(f"{name:<12}{value:8.3f} s")
    for yardstick in ("to the slower side", "to both in turn"):
        for name, value in result[yardstick].items():  # type: ignore[attr-defined]
            print(f"{name:<12}{yardstick:<20}{value:6.3f}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value, text in (
        ("rounds", 9, "rounds that are counted"),
        ("steps", 4, "steps in a row that are counted"),
        ("samples", 8, "of a step, two to one of the teacher's microbatches"),
        ("sequence", 128, "positions of a sample"),
        ("vocab", 8192, "ids"),
        ("student-layers", 4, ""), ("student-hidden", 256, ""), ("teacher-layers", 8, ""), ("teacher-hidden", 512, ""),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default: {value})".strip())
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
