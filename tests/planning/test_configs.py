"""Every configuration in configs/ has a plan that fits its cluster, with stages as balanced as can be."""

from __future__ import annotations

import pytest

from megakd.config.load import load_config
from megakd.planning.cache_plan import build_cache_plan
from megakd.planning.clusters import CLUSTERS
from megakd.planning.job import build_cache_job, build_job, find_models, with_settings
from megakd.planning.plan import Plan, build_plan
from megakd.planning.splits import best_split
from tests.configs.examples import FILES, ROOT, cluster_of

SHAPES = ROOT / "configs" / "models"


def plan_of(name: str, gpu: str, **settings: object) -> Plan:
    cluster = cluster_of(name)
    assert cluster.gigabytes == 80
    config, _ = find_models(load_config(ROOT / "configs" / name), SHAPES)
    job = build_job(with_settings(config, settings), cluster.world_size, "cuda")
    return build_plan(job, CLUSTERS[gpu].model_copy(update={"ranks_per_node": cluster.gpus_per_node}))


@pytest.mark.parametrize("gpu", ["h100", "a100"])
@pytest.mark.parametrize("name", FILES)
def test_the_plan_fits(name, gpu):
    plan = plan_of(name, gpu)
    assert plan.fits, f"{plan.peak / 2**30:.1f} GiB"
    assert 0.2 < plan.timing.mfu < plan.cluster.product_efficiency


@pytest.mark.parametrize("name", FILES)
def test_the_stages_are_balanced(name):
    plan = plan_of(name, "h100")
    found = best_split(plan.job, plan.cluster)
    assert found is not None
    assert plan.timing.seconds < 1.01 * found[1].timing.seconds


def test_the_cache_is_written_on_the_same_cluster():
    config, _ = find_models(load_config(ROOT / "configs" / "llama31_70b_cached_to_1b.yaml"), SHAPES)
    plan = build_cache_plan(build_cache_job(config, 8, "cuda"), CLUSTERS["a100"])
    assert plan.fits and plan.tokens is not None
    # What the file says of it: 17.6 GB of the teacher on a rank, about 0.3 TB of cache.
    assert plan.memory[0].resident["teacher"] == pytest.approx(17.6e9, rel=0.01)
    assert 0.3e12 < plan.tokens * plan.bytes_per_token < 0.7e12


def test_a_cached_teacher_leaves_the_student_alone():
    name = "llama31_70b_cached_to_1b.yaml"
    beside = plan_of(name, "h100")
    path = "runs/llama31_70b_cached_to_1b/teacher_cache"
    alone = plan_of(name, "h100", **{"teacher.source": "cache", "teacher.path": path})
    assert alone.fits and alone.job.teacher is None
    assert alone.timing.teacher == 0.0 and alone.timing.seconds < beside.timing.seconds / 3
