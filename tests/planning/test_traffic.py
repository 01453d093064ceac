"""Bytes that a plan says a step moves, against those that a real step hands to its process groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megakd.config.schema import Config
from megakd.planning.job import build_job
from megakd.planning.timing import step_timing
from megakd.planning.traffic import gather, send
from tests import workers
from tests.parallel.sent_bytes import count_sent_bytes
from tests.planning.jobs import CLUSTER
from tests.training.runs import layout, run_values, save_llama, write_tokens

LAYOUTS = {
    "tensor": (2, layout(2, 1)),
    "sequence": (2, layout(2, 1, parallel__sequence_parallel=True)),
    "sequence_recomputed": (
        2, layout(2, 1, parallel__sequence_parallel=True, student__recompute_granularity="full"),
    ),
    "pipeline": (2, layout(1, 2, parallel__num_layers_in_last_pipeline_stage=1)),
    "pipeline_of_three": (3, layout(1, 3, parallel__num_layers_in_first_pipeline_stage=1,
                                    parallel__num_layers_in_last_pipeline_stage=1)),
    "data": (2, layout()),
    "data_distributed_optimizer": (2, layout(optimizer__use_distributed_optimizer=True, run__dtype="bf16")),
    "tensor_and_pipeline": (4, layout(2, 2, parallel__sequence_parallel=True,
                                      parallel__num_layers_in_last_pipeline_stage=1)),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traffic")
    # Wide enough that tokens' counts and norms, which no plan counts, do not matter.
    for name, hidden, layers in (("student", 128, 3), ("teacher", 192, 6)):
        save_llama(
            folder / name, seed=1, vocab=1024, hidden_size=hidden, intermediate_size=256, num_hidden_layers=layers,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=128,
        )  # fmt: skip
    write_tokens(folder / "data", np.random.default_rng(1).integers(0, 1024, 64 * 64 + 1), 1024)
    return folder


def sent_bytes(values: dict[str, Any]) -> dict[str, float]:
    """What this rank sends in its second step."""
    from tests.training.runs import build

    built = build(values)
    built.train(0, 1)
    with count_sent_bytes() as sent:
        built.train(1, 2)
    return sent


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_busiest_rank_sends_what_the_plan_says(run_ranks, files, name):
    ranks, settings = LAYOUTS[name]
    values = run_values(
        files, data__sequence_length=64, data__micro_batch_size=2, data__global_batch_size=12, **settings
    )
    job = build_job(Config.model_validate(values), ranks, "cpu")
    transfers = step_timing(job, CLUSTER).transfers
    measured = run_ranks(ranks, sent_bytes, values)
    stages = sum(t.link_bytes for name, t in transfers.items() if name.endswith("stages"))
    if job.student.layout.pp > 1:
        assert max(rank["messages"] for rank in measured) == pytest.approx(stages, rel=0.01)
    if job.student.layout.pp == 1:
        collectives = sum(t.link_bytes for name, t in transfers.items() if not name.endswith("stages"))
        assert max(rank["collectives"] for rank in measured) == pytest.approx(collectives, rel=0.05)


def sent_by_side(values: dict[str, Any]) -> tuple[bool, float]:
    """Of a job's rank: whether it is the teacher's; bytes it packs for the other side, or hands to collectives."""
    from megakd.parallel.bridge import Bridge
    from megakd.teacher.turns import Task
    from tests.training.runs import build, serve

    if workers.joint_rank_is_teacher():
        packed, pack = 0, Bridge.pack

        def counted(*args: Any) -> Any:
            nonlocal packed
            result = pack(*args)
            packed += sum(tensor.nbytes for tensor in result.values())
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Bridge, "pack", counted)
            serve(values)
        return True, packed
    built = build(values)
    turns = built.teacher.turns  # the first rank has them
    if turns is not None:
        turns.start(Task(0, 1))
    with count_sent_bytes() as sent:
        built.train(0, 1)
    if turns is not None:
        turns.end()
    return False, sent["collectives"]


def test_two_sides_send_what_the_plan_says(run_ranks, files):
    teacher = {
        "teacher__placement": "dedicated", "teacher__ranks": 2, "teacher__signal_window": 2,
        "teacher__parallel": {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2},
    }  # fmt: skip
    sizes = {"data__sequence_length": 64, "data__micro_batch_size": 2, "data__global_batch_size": 8}
    values = run_values(files, **sizes, **layout(2, 1), **teacher)
    transfers = step_timing(build_job(Config.model_validate(values), 4, "cpu"), CLUSTER).transfers
    measured = run_ranks(4, sent_by_side, values, teacher_ranks=2)
    assert max(size for is_teacher, size in measured if is_teacher) == transfers["teacher to student"].link_bytes
    names = ("student, tensor ranks", "teacher's states, student's tensor ranks", "loss, tensor ranks")
    collectives = sum(transfers[name].link_bytes for name in names)
    assert max(size for is_teacher, size in measured if not is_teacher) == pytest.approx(collectives, rel=0.05)


def test_a_group_over_nodes_uses_each_members_card():
    # Eight ranks on two nodes of four: half of the bytes cross, a quarter of them over each card.
    over, inside = gather(CLUSTER, list(range(8)), 800.0), gather(CLUSTER, list(range(4)), 800.0)
    assert over.network_bytes == pytest.approx(800 / 4 / 2)
    assert inside.network_bytes == 0.0 and inside.link_bytes == pytest.approx(600)
    assert gather(CLUSTER, [3], 800.0).seconds == 0.0


def test_messages_cross_where_stages_are_on_other_nodes():
    assert send(CLUSTER, [0, 3], 100.0).link_bytes == 100.0
    assert send(CLUSTER, [3, 4], 100.0).network_bytes == 100.0
