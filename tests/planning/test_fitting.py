"""Advice on a run that does not fit: tried, whole, and never that nothing helps where something does."""

from __future__ import annotations

from typing import Any

import pytest

from megakd.config.load import load_config
from megakd.planning.advice import advise
from megakd.planning.clusters import CLUSTERS
from megakd.planning.fitting import changed, ways_to_fit
from megakd.planning.job import build_job, find_models
from megakd.planning.plan import Plan, build_plan
from tests.configs.examples import ROOT

LARGE, SMALL = "llama31_70b_to_8b.yaml", "llama31_8b_to_1b.yaml"


def plan_of(name: str, gpu: str, ranks: int, *overrides: str) -> Plan:
    config, _ = find_models(load_config(ROOT / "configs" / name, overrides), ROOT / "configs" / "models")
    cluster = CLUSTERS[gpu].model_copy(update={"ranks_per_node": min(8, ranks)})
    return build_plan(build_job(config, ranks, "cuda"), cluster)


def with_all(plan: Plan, steps: list[dict[str, Any]]) -> Plan:
    reached = changed(plan, {key: value for step in steps for key, value in step.items()})
    assert reached is not None
    return reached


def test_a_teacher_on_the_students_ranks_goes_in_windows():
    plan = plan_of(LARGE, "rtx4090", 16)
    lines = advise(plan)
    assert lines[0].startswith("it fits with all of these")
    assert [line.split(": then")[0] for line in lines[1:]] == [
        "  teacher.signal_window=128", "  student.recompute_granularity=full",
    ]  # fmt: skip
    (way,) = ways_to_fit(plan)
    assert way.plan.timing.seconds < 1.15 * plan.timing.seconds


@pytest.mark.parametrize(
    ("overrides", "part", "expected"),
    [
        (("student.recompute_granularity=full", "teacher.signal_window=1"), 0.98, "teacher.offload=cpu"),
        (("data.micro_batch_size=4", "student.recompute_granularity=full"), 0.95, "teacher.signal_window=32"),
        (
            ("teacher.parallel.micro_batch_size=16", "teacher.signal_window=16", "student.recompute_granularity=full"),
            0.95,
            "teacher.parallel.micro_batch_size=8",
        ),
    ],
)
def test_settings_of_the_teacher_are_tried(overrides, part, expected):
    lines = advise(shrunk(plan_of(SMALL, "h100", 1, *overrides), part))
    assert lines[0].startswith("it fits with") and expected in "\n".join(lines)


def shrunk(plan: Plan, part: float) -> Plan:
    """The same run where a rank has so much of what it needs."""
    cluster = plan.cluster.model_copy(update={"memory_gib": part * plan.peak / 2**30, "reserved_gib": 0.0})
    return build_plan(plan.job, cluster)


def test_tensor_ranks_are_traded_for_stages_where_no_setting_does():
    plan = plan_of(LARGE, "a100-40gb", 8, "parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false",
                   "parallel.pipeline_model_parallel_size=8", "parallel.num_layers_in_first_pipeline_stage=null",
                   "parallel.num_layers_in_last_pipeline_stage=null")  # fmt: skip
    (way,) = ways_to_fit(plan)
    layout = way.plan.job.student.layout
    assert way.plan.fits and layout.tp > 1 and layout.tp * layout.pp == 8
    assert with_all(plan, way.steps).to_dict() == way.plan.to_dict()


@pytest.mark.parametrize(("name", "ranks"), [(LARGE, 16), (SMALL, 8), ("qwen25_7b_to_1b5.yaml", 8)])
@pytest.mark.parametrize("part", [0.85, 0.6])
def test_what_is_told_is_whole_and_nothing_of_it_needless(name, ranks, part):
    plan = shrunk(plan_of(name, "a100", ranks), part)
    for way in ways_to_fit(plan):
        assert with_all(plan, way.steps).fits is way.plan.fits is True
        for step in way.steps if len(way.steps) > 1 else []:
            less = changed(plan, {k: v for other in way.steps if other is not step for k, v in other.items()})
            assert less is None or not less.fits


def test_no_list_follows_where_no_setting_helps():
    overrides = ("teacher.offload=cpu", "student.recompute_granularity=full", "teacher.signal_window=1")
    lines = advise(plan_of(SMALL, "rtx4090", 1, *overrides))
    assert lines == [
        "no setting that was tried makes it smaller; more ranks, or a teacher from a cache (`./launch.sh cache`), are "
        "needed"
    ]


def test_rounding_is_no_time():
    windows = ("teacher.offload=cpu", "student.recompute_granularity=full", "teacher.signal_window=16")
    plan = plan_of(SMALL, "rtx4090", 1, *windows)
    assert plan.window_cost.student == 0.0 and plan.window_cost.teacher > 1.0
    cached = ("teacher.source=cache", "teacher.path=x", "parallel.tensor_model_parallel_size=1")
    assert plan_of("llama31_70b_cached_to_1b.yaml", "h100", 8, *cached).timing.bubble == 0.0
