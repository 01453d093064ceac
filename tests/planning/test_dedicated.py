"""Plans for a teacher on ranks of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megakd.planning.job import Job
from tests.planning.jobs import CLUSTER, build_test_job
from tests.training.runs import layout, save_llama


@pytest.fixture(scope="module")
def teacher_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("teacher")
    save_llama(folder, seed=1, vocab=1024, hidden_size=192, num_hidden_layers=8, num_attention_heads=8,
               num_key_value_heads=4, intermediate_size=256, max_position_embeddings=512)  # fmt: skip
    return str(folder)


def dedicated_job(path: str, world_size: int, ranks: int, tp: int = 1, pp: int = 1, **settings: Any) -> Job:
    """A student of `STUDENT`'s shape and a teacher on the last `ranks`; `teacher_` settings are its section's."""
    teacher = {
        "path": path, "placement": "dedicated", "ranks": ranks,
        "parallel": {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp},
    }  # fmt: skip
    for key in [key for key in settings if key.startswith("teacher__")]:
        teacher[key.removeprefix("teacher__")] = settings.pop(key)
    settings = {"distill__kd_weight": 1.0} | settings
    return build_test_job(world_size, **{f"teacher__{key}": value for key, value in teacher.items()}, **settings)


def test_each_side_is_laid_over_its_own_ranks(teacher_path):
    job = dedicated_job(teacher_path, 12, 4, tp=2, pp=2, **layout(2, 1))
    assert job.teacher is not None
    assert (job.student.layout.dp, job.teacher.layout.dp) == (4, 1)
    assert list(job.student.layout.ranks) == [*range(8)] and list(job.teacher.layout.ranks) == [8, 9, 10, 11]
    assert job.num_microbatches == 16 // (2 * 4) and job.teacher_microbatches == 8
    assert job.teacher_stages(0) == []
    assert job.teacher.layout.boundaries(0) == [[8, 10], [9, 11]]
    assert job.teacher.layout.data_groups(1) == [[10], [11]]


def test_tensor_ranks_that_begin_within_a_node_may_lie_across_two(teacher_path):
    # Ranks 2 to 5 and 6 to 9 on nodes of four.
    job = dedicated_job(teacher_path, 10, 8, tp=4)
    assert job.teacher is not None
    assert job.teacher.layout.tensor_group(CLUSTER.ranks_per_node) == [2, 3, 4, 5]
    assert job.teacher.layout.tensor_group(6) == [2, 3, 4, 5] and job.teacher.layout.tensor_group(7) == [6, 7, 8, 9]
