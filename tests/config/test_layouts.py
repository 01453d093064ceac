"""The teacher's layout as a configuration gives it."""

from __future__ import annotations

import pytest

from megakd.config import layouts
from tests.config.examples import config

TP, PP = "parallel__tensor_model_parallel_size", "parallel__pipeline_model_parallel_size"
CUT = "parallel__sequence_parallel"


@pytest.mark.parametrize(
    ("changes", "own", "expected"),
    [
        ({TP: 2, PP: 2, CUT: True}, {}, (2, 2, True)),
        ({TP: 2, PP: 2, CUT: True}, {"tensor_model_parallel_size": 1}, (1, 2, False)),
        ({TP: 2, CUT: True}, {"tensor_model_parallel_size": 4, "sequence_parallel": False}, (4, 1, False)),
        ({}, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4}, (2, 4, False)),
    ],
)
def test_what_a_teacher_does_not_set_is_as_the_student_s(changes, own, expected):
    parallel = layouts.teacher_parallel(config(**changes, teacher__parallel=own))
    found = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.sequence_parallel
    assert found == expected


def test_a_microbatch_size_alone_is_a_layout_of_its_own():
    assert not layouts.has_own_layout(config(teacher__parallel={"micro_batch_size": 2}))
    assert layouts.has_own_layout(config(teacher__parallel={"micro_batch_size": 4}))


def test_the_wider_model_counts_where_it_runs():
    wide = {"tensor_model_parallel_size": 8}
    assert layouts.widest_tensor_parallel(config(teacher__parallel=wide)) == 8
    assert layouts.widest_tensor_parallel(config(**{TP: 4}, teacher__parallel={"tensor_model_parallel_size": 1})) == 4
    assert layouts.widest_tensor_parallel(config(teacher={"path": "x", "source": "cache"})) == 1


def test_a_cache_is_written_in_the_teacher_s_layout():
    own = {"tensor_model_parallel_size": 4, "micro_batch_size": 8}
    alone = layouts.with_teacher_alone(config(teacher__parallel=own, **{TP: 2}))
    assert alone.data.micro_batch_size == 8
    assert alone.parallel.tensor_model_parallel_size == 4
    assert not layouts.has_own_layout(alone)


def test_a_teacher_on_ranks_of_its_own():
    own = config(**{TP: 2}, teacher__placement="dedicated", teacher__ranks=3)
    assert (layouts.student_ranks(own, 7), layouts.teacher_ranks(own, 7), layouts.least_ranks(own)) == (4, 3, 5)
    assert layouts.has_own_layout(own)
    alone = layouts.with_teacher_alone(own)
    assert not layouts.teacher_is_dedicated(alone)
    assert layouts.student_ranks(alone, 7) == layouts.teacher_ranks(alone, 7) == 7


def test_the_least_ranks_hold_whole_replicas_of_both():
    assert layouts.least_ranks(config(**{TP: 2}, teacher__parallel={"pipeline_model_parallel_size": 4})) == 8
    assert layouts.least_ranks(config(**{TP: 3}, teacher__parallel={"tensor_model_parallel_size": 2})) == 6
    assert layouts.least_ranks(config(**{TP: 3}, teacher={"path": "x", "source": "cache"})) == 3


def test_windows_of_a_step():
    assert layouts.windows_per_step(config(), 2) == 1
    # 16 samples, microbatches of 2 on two data ranks: four microbatches.
    assert layouts.windows_per_step(config(**{TP: 2}, teacher__signal_window=2), 4) == 2
