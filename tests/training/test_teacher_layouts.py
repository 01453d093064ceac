"""A teacher in any layout gives the loss and every gradient that one rank gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import workers
from tests.training.interrupted import run_distill
from tests.training.runs import layout, learnable_tokens, records, run_values, save_llama, write_tokens

SEQUENCE, VOCAB = 16, 300
EIGHT = {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}


def teacher(tp: int | None = None, pp: int | None = None, **settings: Any) -> dict[str, Any]:
    """Settings of the teacher's own layout."""
    return {"teacher__parallel": {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, **settings}}


CUT = {"parallel__sequence_parallel": True}


def dedicated(ranks: int, **settings: Any) -> dict[str, Any]:
    """Settings of a teacher on ranks of its own."""
    return {"teacher__placement": "dedicated", "teacher__ranks": ranks, **settings}


# world size, the student's settings, the teacher's
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp2_pp2_from_tp1_pp4": (4, layout(2, 2), teacher(1, 4)),
    "tp2_pp2_from_tp4_pp1": (4, layout(2, 2), teacher(4, 1)),
    "tp2_pp2_from_dp4": (4, layout(2, 2), teacher(1, 1)),
    "tp2_pp2_from_tp2_dp2": (4, layout(2, 2), teacher(2, 1)),
    "both_cut": (4, layout(2, 2, **CUT), teacher(4, 1, sequence_parallel=True)),
    "student_cut": (4, layout(2, 2, **CUT), teacher(4, 1, sequence_parallel=False)),
    "teacher_cut": (4, layout(2, 2), teacher(4, 1, sequence_parallel=True)),
    "micro_batch_1": (4, layout(2, 2), teacher(1, 4, micro_batch_size=1)),
    "micro_batch_4": (4, layout(1, 2), teacher(2, 2, micro_batch_size=4)),
    "dp4_from_pp4": (4, layout(1, 1), teacher(1, 4)),
    "window_1": (4, layout(2, 2), teacher(1, 4) | {"teacher__signal_window": 1}),
    "window_2": (2, layout(2, 1), {"teacher__signal_window": 2}),
    "window_4_overlapped": (
        4, layout(1, 2, optimizer__overlap_grad_reduce=True, optimizer__use_distributed_optimizer=True),
        teacher(2, 2) | {"teacher__signal_window": 4},
    ),
    "offloaded": (4, layout(2, 2), teacher(4, 1) | {"teacher__offload": "cpu"}),
    "micro_batch_alone": (1, layout(), teacher(micro_batch_size=4)),
    "2_and_2": (4, layout(2, 1), teacher(1, 2) | dedicated(2)),
    "2_and_2_cut": (4, layout(2, 1, **CUT), teacher(2, 1, sequence_parallel=True) | dedicated(2)),
    "2_and_2_student_cut": (4, layout(2, 1, **CUT), teacher(2, 1, sequence_parallel=False) | dedicated(2)),
    "2_and_2_in_windows": (
        4, layout(1, 2), teacher(1, 1) | dedicated(2, teacher__signal_window=2, teacher__prefetch_steps=2),
    ),
    "2_and_2_micro_batch_4": (4, layout(1, 1), teacher(1, 1, micro_batch_size=4) | dedicated(2)),
    "2_and_1": (3, layout(1, 2), teacher(1, 1, micro_batch_size=1) | dedicated(1, teacher__prefetch_steps=0)),
    "2_and_1_windows_of_1": (3, layout(2, 1), teacher(1, 1) | dedicated(1, teacher__signal_window=1)),
    "1_and_2": (3, layout(1, 1), teacher(2, 1) | dedicated(2)),
    "1_and_2_teacher_cut": (3, layout(1, 1), teacher(2, 1, sequence_parallel=True) | dedicated(2)),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    for name, tied in (("student", False), ("tied", True)):
        save_llama(folder / name, seed=1, tie_word_embeddings=tied, hidden_size=32, **EIGHT)
    save_llama(folder / "teacher", seed=2, std=0.2, hidden_size=48, intermediate_size=64, **EIGHT)
    save_llama(folder / "tied_teacher", seed=3, std=0.2, hidden_size=48, tie_word_embeddings=True, **EIGHT)
    write_tokens(folder / "data", learnable_tokens(64 * SEQUENCE + 1))
    write_tokens(folder / "documents", learnable_tokens(64 * SEQUENCE + 1), length=11)
    return folder


def values_of(files: Path, student: str = "student", teacher: str = "teacher", **settings: Any) -> dict[str, Any]:
    values = run_values(files, student__init={"path": str(files / student)}, data__global_batch_size=16, **settings)
    values["optimizer"]["lr"] = 1e-3
    values["teacher"]["path"] = str(files / teacher)
    return values


@contextmanager
def _student_side(values: dict[str, Any], steps: int) -> Iterator[Any]:
    """The student's objects; None on ranks that are the teacher's alone, when they have served it for its steps."""
    from megakd.teacher.turns import Task
    from tests.training.runs import build, serve

    is_dedicated = values["teacher"].get("placement") == "dedicated"
    if is_dedicated and workers.joint_rank_is_teacher():
        serve(values)
        yield None
        return
    built = build(values)
    turns = built.teacher.turns if is_dedicated else None
    if turns is not None:
        turns.start(Task(0, steps))
    yield built
    if turns is not None:
        turns.end()


def first_step(values: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]] | None:
    """Sums of the first global batch and its gradients as full tensors, by Hugging Face name."""
    from tests.training.layout_run import gather_gradients

    with _student_side(values, 1) as built:
        return None if built is None else _first_step(built, gather_gradients)


def _first_step(built: Any, gather_gradients: Callable[..., Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    batches = built.batches()
    try:
        sums = built.accumulate(batches.microbatches(0))
    finally:
        batches.close()
    return sums, gather_gradients(built.student)


def assert_same(found: Any, expected: Any) -> None:
    (sums, gradients), (right_sums, right_gradients) = found, expected
    assert sums == pytest.approx(right_sums, rel=1e-5)
    assert gradients.keys() == right_gradients.keys()
    for name, gradient in gradients.items():
        right = right_gradients[name]
        assert torch.linalg.vector_norm(gradient - right) <= 1e-5 * torch.linalg.vector_norm(right), name


@pytest.fixture(scope="module")
def on_one_rank(run_ranks: Callable[..., Any], files: Path) -> Callable[..., Any]:
    """What one rank gives, in the student's own layout; computed once for each pair of models."""
    known: dict[Any, Any] = {}

    def compute(student: str, teacher: str) -> Any:
        if (student, teacher) not in known:
            known[student, teacher] = run_ranks(1, first_step, values_of(files, student, teacher))[0]
        return known[student, teacher]

    return compute


@pytest.mark.parametrize(
    ("case", "models"),
    [
        *((case, ("student", "teacher")) for case in CASES),
        ("tp2_pp2_from_tp4_pp1", ("tied", "teacher")),
        ("tp2_pp2_from_tp1_pp4", ("student", "tied_teacher")),
        ("both_cut", ("tied", "tied_teacher")),
        ("2_and_2_cut", ("tied", "tied_teacher")),
    ],
)
def test_loss_and_gradients_are_those_of_one_rank(run_ranks, files, on_one_rank, case, models):
    ranks, student, of_teacher = CASES[case]
    values = values_of(files, *models)
    for key, value in (student | of_teacher).items():
        section, name = key.split("__")
        values[section][name] = value
    found = run_ranks(ranks, first_step, values, teacher_ranks=values["teacher"].get("ranks", 0))
    assert_same(found[0], on_one_rank(*models))


@pytest.mark.parametrize("case", ["dp4_from_pp4", "tp2_pp2_from_dp4", "micro_batch_4", "2_and_2_micro_batch_4"])
def test_stretches_that_attend_to_themselves_alone(run_ranks, files, case):
    """Samples of several documents follow one another in one row, and every stage needs to know where they begin."""
    ranks, student, of_teacher = CASES[case]
    settings = {"data__train": str(files / "documents"), "data__reset_attention_mask": True}
    values = values_of(files, **student, **of_teacher, **settings)
    found = run_ranks(ranks, first_step, values, teacher_ranks=values["teacher"].get("ranks", 0))
    assert_same(found[0], run_ranks(1, first_step, values_of(files, **settings))[0])
    with pytest.raises(AssertionError):  # the documents make a difference
        assert_same(found[0], run_ranks(1, first_step, values_of(files, data__train=str(files / "documents")))[0])


FIFTY = ("micro_batch_4", "2_and_2_in_windows")


@pytest.fixture(scope="module")
def curve_of_one_rank(run_ranks, files):
    """Losses of fifty steps on one rank, in the student's own layout."""
    return run_ranks(1, losses_of, fifty_steps(files))[0]


def fifty_steps(files: Path, **settings: Any) -> dict[str, Any]:
    values = values_of(files, schedule__train_steps=50, **settings)
    values["data"].update(train=str(files / "data"), global_batch_size=16)
    return values


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in FIFTY else [pytest.mark.slow]) for case in CASES]
)
def test_fifty_steps_give_one_curve(run_ranks, files, curve_of_one_rank, case):
    ranks, student, of_teacher = CASES[case]
    values = fifty_steps(files, **student, **of_teacher)
    found = run_ranks(ranks, losses_of, values, teacher_ranks=values["teacher"].get("ranks", 0))[0]
    assert found == pytest.approx(curve_of_one_rank, rel=1e-4)
    assert found[-1] < 0.8 * found[0]


def test_held_out_samples_need_not_fill_the_teacher_s_microbatches(run_ranks, files, tmp_path):
    """Five samples, of which a teacher on four data ranks goes through eight at a time."""
    settings = {"data__valid_fraction": 0.08, "evaluation__at_end": True, "schedule__train_steps": 1}
    lines = []
    for ranks, placed in ((1, layout()), (4, layout(2, 2) | teacher(1, 1))):
        out = tmp_path / str(ranks)
        run_ranks(ranks, run_distill, values_of(files, run__output_dir=str(out / "run"), **settings, **placed))
        lines += records(out, "evaluations.jsonl")
    assert len(lines) == 2
    assert lines[1] == pytest.approx(lines[0], rel=1e-4)
    assert lines[0]["num_tokens"] == 5 * SEQUENCE


def losses_of(values: dict[str, Any]) -> list[float] | None:
    steps = values["schedule"]["train_steps"]
    with _student_side(values, steps) as built:
        return None if built is None else built.train(0, steps)


def held_bytes(values: dict[str, Any]) -> int:
    """Most bytes of signals that a rank's student was given at a time, over a step."""
    from tests.training.runs import build

    built = build(values)
    most = 0
    signals = built.teacher.signals

    def watched(microbatches):
        nonlocal most
        found = signals(microbatches)
        most = max(most, sum(signal.hidden.untyped_storage().nbytes() for signal in found if signal is not None))
        return found

    built.teacher.signals = watched
    built.train(0, 1)
    return most


def test_a_window_bounds_what_is_held(run_ranks, files):
    # One sample a microbatch: a window of one has two samples, and the teacher two data ranks.
    own = teacher(1, 1, micro_batch_size=1) | {"run__dtype": "bf16"}
    sizes = {
        window: max(run_ranks(2, held_bytes, values_of(files, **layout(2, 1), **own, teacher__signal_window=window)))
        for window in (1, 2, 8)
    }
    # A stretch of half a sequence of two samples, hidden size 48, two bytes each.
    assert sizes == {window: window * 2 * SEQUENCE // 2 * 48 * 2 for window in (1, 2, 8)}


def teacher_on_the_device(values: dict[str, Any]) -> list[list[int]]:
    """Elements of the teacher's layers that are there before, while and after it runs, in each of two steps."""
    from tests.training.runs import build

    built = build(values)
    model = built.teacher._stage.model
    run, counts = built.teacher._stage.run, []

    def count() -> int:
        return sum(parameter.untyped_storage().nbytes() // 4 for parameter in model.parameters())

    def watched(microbatches):
        found = run(microbatches)
        counts[-1].append(count())
        return found

    built.teacher._stage.run = watched
    for step in range(2):
        counts.append([count()])
        built.train(step, step + 1)
        counts[-1].append(count())
    return counts


@pytest.mark.parametrize("of_teacher", [{}, teacher(2, 1)])
def test_offloaded_weights_are_there_only_while_the_teacher_runs(run_ranks, files, of_teacher):
    values = values_of(files, **layout(1, 2), **of_teacher)
    kept = run_ranks(2, teacher_on_the_device, values)
    values["teacher"]["offload"] = "cpu"
    for parked, there in zip(run_ranks(2, teacher_on_the_device, values), kept, strict=True):
        count = there[0][0]
        assert count > 0 and there == [[count, count, count]] * 2
        assert parked == [[0, count, 0]] * 2


@pytest.mark.parametrize("vocab", [1000, 128000])
@pytest.mark.parametrize(
    ("tp", "pp", "own_ranks", "of_teacher"),
    [(2, 2, 0, teacher(1, 4)), (1, 1, 0, teacher(1, 4)), (2, 1, 2, teacher(1, 2)),
     (2, 1, 2, teacher(2, 1, sequence_parallel=True)), (2, 1, 2, teacher(2, 1, sequence_parallel=False))],
)  # fmt: skip
def test_states_travel_once_whatever_the_vocabulary(run_ranks, tmp_path, vocab, tp, pp, own_ranks, of_teacher):
    for name, hidden in (("student", 32), ("teacher", 256)):
        save_llama(tmp_path / name, seed=1, vocab=vocab, hidden_size=hidden, **EIGHT)
    write_tokens(tmp_path / "data", learnable_tokens(64 * SEQUENCE + 1), vocab)
    values = run_values(tmp_path, run__dtype="bf16", data__global_batch_size=16, **layout(tp, pp), **of_teacher)
    if own_ranks:
        values["teacher"].update(placement="dedicated", ranks=own_ranks)
    sent = run_ranks(4, crossing_bytes, values, teacher_ranks=own_ranks)
    crossing, gathered = (sum(of_ranks) for of_ranks in zip(*sent, strict=True))
    states = 2 * 256 * 16 * SEQUENCE
    # What a rank of the student needs and has is not sent: nothing of it where the last stage is the teacher's as well.
    kept = {(2, 2, 0): 0.5, (1, 1, 0): 0.25, (2, 1, 2): 0.0}[tp, pp, own_ranks]
    assert (1 - kept) * states <= crossing <= 1.05 * states
    # Beside it, inside the student's tensor group: either rank's half to the other.
    assert gathered == (tp - 1) * states


def crossing_bytes(values: dict[str, Any]) -> tuple[float, float]:
    """Bytes of a step that this rank sends to bring states from mesh to mesh, and to the other tensor ranks then."""
    import megakd.teacher.online as online
    from megakd.losses.inputs import LossInputs
    from megakd.parallel.bridge import Bridge
    from megakd.teacher import TeacherServer
    from tests.parallel.sent_bytes import count_sent_bytes

    totals = {"crossing": 0.0, "gathered": 0.0}

    def counted(owner: Any, name: str, total: str, *kinds: str) -> None:
        function = getattr(owner, name)

        def call(*args, **kwargs):
            with count_sent_bytes() as sent:
                result = function(*args, **kwargs)
            totals[total] += sum(sent[kind] for kind in kinds)
            return result

        patch.setattr(owner, name, call)

    with pytest.MonkeyPatch.context() as patch:
        counted(online, "regroup", "crossing", "collectives", "messages")
        counted(Bridge, "carry", "crossing", "collectives", "messages")
        # Beside what its own pipeline passes on.
        counted(TeacherServer, "compute", "crossing", "between_worlds")
        counted(LossInputs, "rows", "gathered", "collectives", "messages")
        with _student_side(values, 1) as built:
            if built is not None:
                built.train(0, 1)
    return totals["crossing"], totals["gathered"]
