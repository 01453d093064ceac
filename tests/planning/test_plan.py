"""A plan as a whole: what fits, what it advises, which split and layout it prefers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megakd.common.errors import UserError
from megakd.config.load import load_config
from megakd.planning.advice import advise
from megakd.planning.clusters import CLUSTERS, load_cluster
from megakd.planning.job import build_job, find_models, with_settings
from megakd.planning.plan import build_plan
from megakd.planning.splits import best_split, possible_splits
from megakd.planning.sweep import sweep
from megakd.planning.wording import GIB
from tests.configs.examples import ROOT
from tests.planning.jobs import CLUSTER, build_test_job

CONFIGS = ROOT / "configs"

LARGE = {
    "num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32, "num_query_groups": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip


def with_changes(job, settings):
    return build_job(with_settings(job.config, settings), job.world_size, job.device_type)


def large_job(world_size: int = 8, **settings):
    return build_test_job(
        world_size, device_type="cuda", shape=LARGE, run__dtype="bf16", data__sequence_length=8192,
        **{"data__micro_batch_size": 1, "data__global_batch_size": 64} | settings,
    )  # fmt: skip


def test_what_does_not_fit_is_told_what_to_change():
    plan = build_plan(large_job(), CLUSTERS["h100"])
    assert not plan.fits
    advice = "\n".join(advise(plan))
    assert "it fits with" in advice
    # What is advised is tried.
    better = build_plan(
        with_changes(plan.job, {"optimizer.use_distributed_optimizer": True, "student.recompute_granularity": "full"}),
        plan.cluster,
    )
    assert better.fits and better.peak < plan.peak
    assert "optimizer.use_distributed_optimizer=true" in advice


def test_one_setting_that_suffices_is_offered_alone():
    job = large_job(optimizer__use_distributed_optimizer=True)
    cluster = CLUSTERS["h100"]
    plan = build_plan(job, cluster)
    assert not plan.fits
    lines = advise(plan)
    assert lines[0] == "it fits with one of these:"
    assert any(line.startswith("  student.recompute_granularity=full: ") for line in lines)


def test_what_cannot_fit_says_so():
    tiny = CLUSTERS["h100"].model_copy(update={"memory_gib": 3.0, "reserved_gib": 0.2})
    assert "it does not fit with these either" in advise(build_plan(large_job(), tiny))[0]


def test_what_fits_is_left_alone():
    assert advise(build_plan(build_test_job(), CLUSTER)) == []


def test_a_heavy_head_takes_layers_off_the_last_stage():
    job = build_test_job(
        4, shape={"vocab_size": 128 * 200}, parallel__pipeline_model_parallel_size=4, data__global_batch_size=64,
    )  # fmt: skip
    even = build_plan(job, CLUSTER)
    split, better = best_split(job, CLUSTER)
    assert better.job.student.layout.stage_layers[-1] < 2
    assert better.timing.seconds < even.timing.seconds
    assert sum(better.job.student.layout.stage_layers) == 8
    assert any("better balanced with parallel.num_layers_in_first_pipeline_stage=" in line for line in advise(even))
    assert split.settings()["parallel.num_layers_in_last_pipeline_stage"] == 1


@pytest.mark.parametrize(("layers", "stages"), [(8, 1), (8, 2), (8, 4), (7, 4), (80, 8), (3, 3)])
def test_splits_are_distinct_and_whole(layers, stages):
    from megakd.planning.layout import split_layers

    found = [split_layers(layers, stages, s.first, s.last) for s in possible_splits(layers, stages)]
    assert found and len(set(found)) == len(found)
    assert all(sum(split) == layers and min(split) > 0 and len(split) == stages for split in found)


def test_a_sweep_ranks_what_fits_by_time_and_says_why_not():
    job = large_job(16, optimizer__use_distributed_optimizer=True)
    candidates, refused = sweep(job.config, 16, CLUSTERS["h100"])
    assert [c.plan.fits for c in candidates] == sorted((c.plan.fits for c in candidates), reverse=True)
    times = [c.plan.timing.seconds for c in candidates if c.plan.fits]
    assert times == sorted(times) and times
    layouts = {(c.plan.job.student.layout.tp, c.plan.job.student.layout.pp) for c in candidates}
    assert (8, 2) in layouts and all(tp <= 8 for tp, _ in layouts)
    for candidate in candidates:
        # What a line says to set leads to that plan.
        again = build_plan(with_changes(job, candidate.settings()), CLUSTERS["h100"])
        assert again.to_dict() == candidate.plan.to_dict()
    small = build_test_job(8)
    _, refused = sweep(small.config, 16, CLUSTER)
    assert "data.global_batch_size" in refused["TP 1 x PP 1"]


def test_a_sweep_goes_in_windows_and_parks_before_it_says_no():
    config, _ = find_models(load_config(CONFIGS / "llama31_70b_to_8b.yaml"), CONFIGS / "models")
    cluster = CLUSTERS["rtx4090"]
    candidates, _ = sweep(config, 16, cluster)
    fitting = [c for c in candidates if c.plan.fits]
    for candidate in fitting:
        again = build_plan(build_job(with_settings(config, candidate.settings()), 16, "cuda"), cluster)
        assert again.to_dict() == candidate.plan.to_dict()
    whole = {"teacher.signal_window": 128, "student.recompute_granularity": "full"}
    known = build_plan(build_job(with_settings(config, whole), 16, "cuda"), cluster)
    assert known.fits and fitting[0].plan.timing.seconds <= known.timing.seconds
    assert (4, 4) in {(c.plan.job.student.layout.tp, c.plan.job.student.layout.pp) for c in fitting}
    assert any(c.teacher_settings.get("teacher.parallel.tensor_model_parallel_size") for c in fitting)


def test_a_slower_split_that_fits_is_found():
    job = build_test_job(
        4, shape={"num_layers": 64, "vocab_size": 128 * 100}, parallel__pipeline_model_parallel_size=4,
        data__global_batch_size=64,
    )  # fmt: skip
    peaks = [build_plan(split_job, CLUSTER).peak for split_job in all_splits(job)]
    tight = CLUSTER.model_copy(update={"memory_gib": 1.0001 * min(peaks) / 2**30})
    found = best_split(job, tight)
    assert found is not None and found[1].fits and not build_plan(job, tight).fits
    none = best_split(job, CLUSTER.model_copy(update={"memory_gib": 0.9 * min(peaks) / 2**30}))
    assert none is not None and none[1].peak == min(peaks)


def all_splits(job):
    return [with_changes(job, split.settings()) for split in possible_splits(64, 4)]


def test_more_of_everything_is_faster():
    job = large_job(optimizer__use_distributed_optimizer=True)
    plan = build_plan(job, CLUSTERS["h100"])
    for key in ("bf16_tflops", "memory_gb_per_s", "link_gb_per_s"):
        faster = CLUSTERS["h100"].model_copy(update={key: 2 * getattr(CLUSTERS["h100"], key)})
        assert build_plan(job, faster).timing.seconds < plan.timing.seconds
    assert 0 < plan.timing.mfu < CLUSTERS["h100"].product_efficiency
    assert plan.price(2e9) == pytest.approx(2 * plan.price(1e9))


def test_several_nodes_pay_for_the_network():
    job = large_job(16)
    narrow = CLUSTERS["h100"].model_copy(update={"network_gb_per_s": 10})
    wide = narrow.model_copy(update={"ranks_per_node": 16})
    over, inside = (build_plan(job, cluster).timing for cluster in (narrow, wide))
    assert over.transfers["gradients, data ranks"].network_bytes > 0
    assert inside.transfers["gradients, data ranks"].network_bytes == 0
    assert over.seconds > inside.seconds


def test_a_sliding_window_attends_to_less():
    full, window = large_job(), large_job()
    narrow = replace(
        window.student, architecture=window.student.architecture.model_copy(update={"sliding_window": 1024})
    )
    assert (
        build_plan(replace(window, student=narrow), CLUSTER).flops[0].forward
        < build_plan(full, CLUSTER).flops[0].forward
    )


def test_clusters_come_from_files_too(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "{device: X, ranks_per_node: 2, memory_gib: 10, bf16_tflops: 1, fp32_tflops: 1, memory_gb_per_s: 1, "
        "link_gb_per_s: 1, network_gb_per_s: 1}"
    )
    assert load_cluster(str(file)).name == "mine"
    assert load_cluster(str(file), 4).ranks_per_node == 4
    assert load_cluster("h100").memory_gib * GIB < 86e9


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("h101", None, "--cluster is 'h101'; it must be one of .* Did you mean 'h100'?"),
        ("x.yaml", None, "--cluster: x.yaml does not exist"),
        ("x.yaml", "[1]", "must hold a cluster's keys"),
        ("x.yaml", "{memory: 80}", "memory.*Did you mean 'memory_gib'?"),
        ("x.yaml", "{memory_gib: -1}", "memory_gib is -1"),
        (
            "x.yaml",
            "{memory_gib: 1, reserved_gib: 2, bf16_tflops: 1, fp32_tflops: 1, memory_gb_per_s: 1, link_gb_per_s: 1, "
            "network_gb_per_s: 1}",
            "reserved_gib is 2; it must be below memory_gib, 1",
        ),
    ],
)
def test_a_wrong_cluster_is_told(tmp_path, monkeypatch, name, text, message):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_cluster(name)


def test_this_machine_is_a_cluster():
    found = load_cluster("local", 2)
    assert found.ranks_per_node == 2 and found.device_type == "cpu"
    assert 0 < found.fp32_tflops < 100 and found.memory_gib > 0.5


def test_a_stage_that_lies_across_nodes_pays_for_the_network():
    # Replicas of six on nodes of four: the first stage's are on two nodes, too, and so are the second's.
    job = build_test_job(12, parallel__pipeline_model_parallel_size=2, data__global_batch_size=24)
    plan = build_plan(job, CLUSTER.model_copy(update={"ranks_per_node": 6}))
    assert plan.timing.transfers["gradients, data ranks"].network_bytes == 0
    job = build_test_job(24, parallel__pipeline_model_parallel_size=4, data__global_batch_size=24)
    plan = build_plan(job, CLUSTER.model_copy(update={"ranks_per_node": 8}))
    # The first stage's six are on one node; the second's are not.
    assert plan.timing.transfers["gradients, data ranks"].network_bytes > 0
