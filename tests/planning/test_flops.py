"""Operations of all ranks are those that the models need."""

from __future__ import annotations

import pytest

from megakd.planning.flops import stage_flops
from megakd.training.flops import step_flops
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
