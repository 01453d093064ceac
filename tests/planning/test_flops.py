"""Operations of all ranks are those that the models need."""

from __future__ import annotations

import pytest

from megakd.job.flops import attention_products, step_flops
from megakd.planning.flops import stage_flops
from tests.planning.jobs import build_test_job


@pytest.mark.parametrize(("tp", "pp", "first"), [(1, 1, None), (2, 2, None), (2, 2, 5), (1, 4, None)])
def test_the_stages_add_up(tp, pp, first):
    job = build_test_job(
        2 * tp * pp, parallel__tensor_model_parallel_size=tp, parallel__pipeline_model_parallel_size=pp,
        parallel__num_layers_in_first_pipeline_stage=first,
    )  # fmt: skip
    total = sum(s.forward + s.backward + s.loss for s in stage_flops(job)) * tp * job.student.layout.dp
    needed = step_flops(job.student.architecture, None, job.sequence_length, job.step_tokens)
    assert total * job.num_microbatches == pytest.approx(needed, rel=1e-12)


def test_recomputation_adds_a_forward_pass_or_attention_alone():
    plain, selective, full = (
        stage_flops(build_test_job(student__recompute_granularity=kind))[0] for kind in ("none", "selective", "full")
    )
    assert full.backward - plain.backward == pytest.approx(plain.forward)
    assert 0 < selective.backward - plain.backward < plain.forward / 4
    assert plain.forward == selective.forward == full.forward


@pytest.mark.parametrize("length", [4, 64, 128])
@pytest.mark.parametrize("window", [None, 4, 32, 128])
def test_a_run_counts_a_sliding_window_as_a_plan_does(length: int, window: int | None) -> None:
    job = build_test_job(shape={"sliding_window": window}, data__sequence_length=length)
    a = job.student.architecture
    total = sum(s.forward + s.backward + s.loss for s in stage_flops(job)) * job.student.layout.dp
    assert step_flops(a, None, length, job.step_tokens) == pytest.approx(total * job.num_microbatches, rel=1e-12)
    # Position n sees itself and those before it, as many as the window has; half of its own score is a convention.
    seen = sum(min(n + 0.5, window or length) for n in range(length)) / length
    scores = 2 * a.num_attention_heads * a.kv_channels * seen
    assert attention_products(a, length) == pytest.approx(scores, rel=0.04)
