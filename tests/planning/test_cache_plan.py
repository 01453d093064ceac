"""Plans of the writing of a cache, against counts by hand and a cache that was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megakd.cache.manifest import read_manifest
from megakd.config.schema import Config
from megakd.planning.cache_plan import CachePlan, build_cache_plan
from megakd.planning.job import build_cache_job, build_job
from megakd.planning.plan import build_plan
from megakd.planning.render_cache import describe_cache_plan
from megakd.training.teacher_cache import WINDOW
from tests.cache import caches
from tests.planning.jobs import CLUSTER
from tests.training.runs import layout, run_values, save_llama, write_tokens

LENGTH, VOCAB, HIDDEN = 64, 1024, 64


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache-plan")
    for name, hidden in (("student", 32), ("teacher", HIDDEN)):
        save_llama(folder / name, seed=1, vocab=VOCAB, hidden_size=hidden, intermediate_size=96, num_key_value_heads=4)
    return folder


def config_of(files: Path, **settings: Any) -> Config:
    values = run_values(files, data__sequence_length=LENGTH, data__global_batch_size=8, **settings)
    return Config.model_validate(values)


def plan_of(config: Config, ranks: int = 1, **cluster: Any) -> CachePlan:
    return build_cache_plan(build_cache_job(config, ranks, "cuda"), CLUSTER.model_copy(update=cluster))


def test_operations_are_those_of_layers_and_head(files):
    plan = plan_of(config_of(files, data__micro_batch_size=2))
    one = plan_of(config_of(files, data__micro_batch_size=2, **layout(2, 2)), 4)
    assert plan.head_flops == 2 * 2 * LENGTH * HIDDEN * VOCAB
    assert one.head_flops == plan.head_flops / 2
    assert sum(one.stage_flops) == pytest.approx(sum(plan.stage_flops) / 2)
    # The teacher of a training run does the same work for a microbatch.
    trained = build_plan(build_job(config_of(files, data__micro_batch_size=2), 1, "cuda"), CLUSTER)
    assert plan.stage_flops == [trained.flops[0].teacher]


def test_time_is_the_busiest_stage_and_more_replicas_share_it(files):
    plan = plan_of(config_of(files))
    assert plan.window_seconds == pytest.approx(WINDOW * (plan.stage_seconds[0] + plan.extraction))
    logits = plan.teacher.micro_batch_size * LENGTH * VOCAB * 4
    products = plan.head_flops / (CLUSTER.fp32_tflops * 1e12 * CLUSTER.product_efficiency)
    passes = (plan.extraction - products) * CLUSTER.memory_gb_per_s * 1e9 * CLUSTER.transfer_efficiency / logits
    assert passes == pytest.approx(10)
    assert plan.window_tokens == WINDOW * plan.teacher.micro_batch_size * LENGTH
    assert plan.mfu == pytest.approx(
        (plan.stage_flops[0] + plan.head_flops) * WINDOW / plan.window_seconds / (CLUSTER.fp32_tflops * 1e12)
    )
    assert plan_of(config_of(files), 4).tokens_per_second == pytest.approx(4 * plan.tokens_per_second)
    staged = plan_of(config_of(files, **layout(1, 2)), 2)
    assert plan.tokens_per_second < staged.tokens_per_second < 2 * plan.tokens_per_second


def test_a_layout_and_microbatches_of_the_teachers_own_are_used(files):
    own = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
        "micro_batch_size": 4,
        "sequence_parallel": True,
    }
    plan = plan_of(config_of(files, teacher__parallel=own, **layout(1, 2)), 4)
    assert (plan.teacher.layout.tp, plan.teacher.layout.pp, plan.teacher.layout.dp) == (2, 1, 2)
    assert plan.teacher.micro_batch_size == 4 and plan.teacher.layout.sequence_parallel
    assert "gathered sequences" in plan.memory[0].resident


def test_tokens_are_those_of_the_run_or_not_known(files):
    config = config_of(files, cache__scope="run", schedule__train_steps=100)
    plan = plan_of(config)
    assert plan.tokens == 100 * 8 * LENGTH
    assert "the run's 51,200 tokens take" in "\n".join(describe_cache_plan(plan, config))
    config = config_of(files, schedule__train_steps=100)
    assert plan_of(config).tokens is None
    assert "a billion tokens take" in "\n".join(describe_cache_plan(plan_of(config), config))


def test_a_cache_takes_no_more_than_is_said(files, run_ranks, tmp_path):
    """Short samples, of which each has entries in the index and its last bytes to fill."""
    write_tokens(files / "data", np.random.default_rng(1).integers(0, VOCAB, LENGTH * 40 + 1), VOCAB)
    for mode in ("sampled", "topk"):
        config = config_of(files, cache__mode=mode, cache__path=str(tmp_path / mode))
        run_ranks(1, run_cache, config.model_dump())
        manifest = read_manifest(tmp_path / mode)
        assert 0.5 * plan_of(config).bytes_per_token < manifest.bytes_per_row <= plan_of(config).bytes_per_token


def run_cache(values: dict[str, Any]) -> None:
    from megakd.training.caching import write_cache

    write_cache(Config.model_validate(values))


def test_what_does_not_fit_is_told_layouts_that_do(files):
    config = config_of(files, data__micro_batch_size=8)
    needed = plan_of(config, 4).peak / 2**30
    plan = plan_of(config, 4, memory_gib=0.6 * needed)
    assert not plan.fits
    *_, advice = "\n".join(describe_cache_plan(plan, config)).partition("it fits with one of these:\n")
    settings = [line.split(":")[0].split() for line in advice.splitlines()]
    assert 1 <= len(settings) <= 5
    for line in settings:
        changes: dict[str, Any] = {}
        for setting in line:
            key, value = setting.split("=")
            changes[key.replace(".", "__")] = value
        changed = config_of(files, **({"data__micro_batch_size": 8} | changes))
        assert plan_of(changed, 4, memory_gib=0.6 * needed).fits
    # Neither another layout nor smaller microbatches alone, but both.
    least = min(plan_of(config_of(files, **layout(tp, pp)), 4).peak for tp, pp in ((4, 1), (2, 2), (1, 4))) / 2**30
    tight = plan_of(config, 4, memory_gib=1.02 * least)
    assert "data.micro_batch_size=1" in "\n".join(describe_cache_plan(tight, config))
    hopeless = plan_of(config, 4, memory_gib=0.01 * needed)
    assert "more ranks for one teacher" in "\n".join(describe_cache_plan(hopeless, config))


def test_a_faster_layout_is_told(files):
    config = config_of(files, **layout(4, 1))
    text = "\n".join(describe_cache_plan(plan_of(config, 4), config))
    assert "it is faster with:\n  parallel.tensor_model_parallel_size=1" in text


def test_a_cache_that_is_there_says_how_much_of_a_token_it_has(files, tmp_path):
    def signal_bytes(path: Path) -> int:
        config = config_of(files, teacher__source="cache", teacher__path=str(path), cache__num_samples=20)
        return build_job(config, 1, "cuda").signal_bytes

    caches.write(tmp_path / "cache", [0, 1, 2])
    assert signal_bytes(tmp_path / "cache") == caches.DRAWS * 12 + 4
    assert signal_bytes(tmp_path / "to come") == 20 * 12 + 4
