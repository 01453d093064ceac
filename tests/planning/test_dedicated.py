"""Plans for a teacher on ranks of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megakd.common.errors import UserError
from megakd.job.flops import step_flops
from megakd.planning.advice import advise
from megakd.planning.crossing import crossing_transfer, sent_tokens
from megakd.planning.job import Job, build_job, with_settings
from megakd.planning.memory import stage_memory
from megakd.planning.plan import build_plan
from megakd.planning.stages import stage_parameters
from megakd.planning.sweep import sweep
from megakd.planning.teacher_memory import teacher_memory
from megakd.planning.timing import step_timing
from megakd.planning.windows import window_cost
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


WIDTH = 192 * 4  # bytes of one of the teacher's hidden states
STEP = 16 * 128  # tokens


def test_the_student_holds_the_teachers_head_and_no_layer(teacher_path):
    job = dedicated_job(teacher_path, 6, 2, pp=2, **layout(1, 2))
    first, last = stage_memory(job)
    assert first.resident["teacher"] == 0 and last.resident["teacher"] == 1024 * WIDTH
    assert not any(name in moments for moments in (first.moments, last.moments) for name in ("teacher", "to cross"))
    # Two replicas: each receives half of the step and unpacks it.
    assert last.moments["receiving"] == {"signals": STEP / 2 * WIDTH, "received": STEP / 2 * WIDTH}
    assert first.moments["receiving"]["received"] == 0
    assert last.moments["backward"]["signals"] == STEP / 2 * WIDTH


def test_tensor_ranks_and_windows_share_out_what_is_received(teacher_path):
    job = dedicated_job(teacher_path, 4, 2, tp=2, **layout(2, 1), teacher__signal_window=2)
    # Two microbatches of two samples, half of each sequence.
    assert stage_memory(job)[0].moments["receiving"]["received"] == 2 * 2 * 128 * WIDTH / 2


@pytest.mark.parametrize(("prefetch", "window", "ahead"), [(0, None, 0), (1, None, 1), (3, None, 3), (2, 2, 2 * 4)])
def test_the_teacher_holds_its_layers_and_the_windows_that_are_ahead(teacher_path, prefetch, window, ahead):
    settings = {"teacher__prefetch_steps": prefetch, "teacher__signal_window": window}
    job = dedicated_job(teacher_path, 3, 2, pp=2, **settings)
    first, last = teacher_memory(job)
    assert job.teacher is not None
    layers = stage_parameters(job.teacher, has_head=False)
    assert [first.resident["teacher"], last.resident["teacher"]] == [4 * stage.count for stage in layers]
    # Four layers, the embedding or the last norm, and no head.
    assert layers[0].count - layers[1].count == 1024 * 192 - 192
    size = STEP * WIDTH / (1 if window is None else 4)
    assert last.moments["packing"] == {"signals": size, "to cross": (ahead + 1) * size}
    assert last.moments["teacher"]["to cross"] == ahead * size
    assert "to cross" not in first.moments["teacher"]


def test_a_run_fits_where_both_sides_do(teacher_path):
    job = dedicated_job(teacher_path, 4, 2, pp=2)
    plan = build_plan(job, CLUSTER)
    students, teachers = (max(stage.peak for stage in side) for side in (plan.memory, plan.teacher_memory))
    assert plan.peak == max(students, teachers) and plan.fits
    between = plan.cluster.model_copy(update={"memory_gib": (students + teachers) / 2 / 2**30})
    assert not build_plan(job, between).fits


def test_tensor_ranks_that_all_have_the_states_send_what_as_many_of_the_student_ask_for(teacher_path):
    # Four tensor ranks hold every state; the student's two take half of each sequence from two of them.
    whole = dedicated_job(teacher_path, 6, 4, tp=4, **layout(2, 1))
    assert sent_tokens(whole) == STEP / 2
    cut = {"tensor_model_parallel_size": 4, "sequence_parallel": True}
    assert sent_tokens(dedicated_job(teacher_path, 6, 4, teacher__parallel=cut, **layout(2, 1))) == STEP / 4


def test_what_crosses_goes_over_the_links_between_the_two_ranks(teacher_path):
    # Nodes of four: the teacher's ranks 4 and 5 are on the second, or with 2 + 2 on the first.
    apart = crossing_transfer(dedicated_job(teacher_path, 6, 2), CLUSTER)
    assert (apart.link_bytes, apart.network_bytes, apart.calls) == (0, STEP * WIDTH / 2, 2)
    together = crossing_transfer(dedicated_job(teacher_path, 4, 2), CLUSTER)
    assert (together.link_bytes, together.network_bytes, together.calls) == (STEP * WIDTH / 2, 0, 1)
    # Ranks 2 and 3 of the teacher's six are on the student's node; those that are not set the pace.
    mixed = crossing_transfer(dedicated_job(teacher_path, 8, 6, data__global_batch_size=24), CLUSTER)
    assert (mixed.link_bytes, mixed.network_bytes, mixed.calls) == (0, 24 * 128 * WIDTH / 6, 1)


def test_one_rank_that_receives_from_many_is_no_faster(teacher_path):
    seconds = [crossing_transfer(dedicated_job(teacher_path, 1 + n, n, tp=1), CLUSTER).seconds for n in (1, 2)]
    assert seconds[0] == pytest.approx(seconds[1], rel=1e-6)
    assert seconds[0] == pytest.approx(STEP * WIDTH / (400e9 * 0.75) + 8e-6)


def steady_step(teacher: float, crossing: float, student: float, after: float, windows: int, ahead: int) -> float:
    """Seconds of a late step of two sides that go through windows as TeacherServer and RemoteTeacher do.

    Args:
        teacher, crossing, student: seconds of a window.
        after: of the student at the end of a step.
        ahead: windows that the teacher may be ahead.
    """
    steps = 40
    begun, free, ends = [], 0.0, [0.0]
    computed = 0.0
    count = 0
    for _ in range(steps):
        for _ in range(windows):
            begun.append(free)
            allowed = begun[count - ahead] if count >= ahead else 0.0
            computed = max(computed, allowed) + teacher
            # No window is computed before those in front of it are; the student begins when it has nothing else to do.
            free = max(free, computed) + crossing + student
            count += 1
        free += after
        ends.append(free)
    return (ends[-1] - ends[steps // 2]) / (steps - steps // 2)


@pytest.mark.parametrize("share", [0.3, 1.7])
@pytest.mark.parametrize(("prefetch", "window"), [(0, None), (1, None), (2, None), (0, 2), (1, 2), (2, 4)])
def test_a_step_is_as_long_as_two_sides_need_that_wait_for_each_other(teacher_path, prefetch, window, share):
    settings = {"teacher__prefetch_steps": prefetch, "teacher__signal_window": window}
    job = dedicated_job(teacher_path, 3, 2, pp=2, **settings)
    found = step_timing(job, CLUSTER)
    t = replace(found, teacher=share * found.student_side)
    count = job.num_windows
    expected = steady_step(
        t.teacher / count, t.crossing / count, t.student / count, t.exposed + t.optimizer, count, prefetch * count
    )
    assert t.seconds == pytest.approx(expected, rel=1e-6)
    assert t.student_waits == pytest.approx(t.seconds - t.crossing - t.student - t.exposed - t.optimizer)
    assert t.teacher_waits == pytest.approx(t.seconds - t.teacher)
    if prefetch:
        assert min(t.student_waits, t.teacher_waits) == 0.0
        assert (t.student_waits > 0) == (share > 1)
    else:
        assert t.student_waits == pytest.approx(t.teacher)


def test_all_ranks_are_paid_for_and_counted(teacher_path):
    job = dedicated_job(teacher_path, 4, 2, pp=2)
    plan = build_plan(job, CLUSTER)
    assert job.teacher is not None
    needed = step_flops(job.student.architecture, job.teacher.architecture, 128, STEP)
    assert plan.timing.mfu == pytest.approx(needed / plan.timing.seconds / (4 * 100e12))
    assert plan.price(STEP) == pytest.approx(plan.timing.seconds / 3600 * 4 * 2.0)
    figures = plan.to_dict()
    assert (figures["ranks"], figures["student_ranks"], figures["teacher_ranks"]) == (4, 2, 2)
    assert [stage["teacher_layers"] for stage in figures["teacher_stages"]] == [4, 4]
    assert [stage["teacher_layers"] for stage in figures["stages"]] == [0]


def test_windows_cost_what_both_pipelines_need_to_fill_again(teacher_path):
    settings = {"teacher__signal_window": 2, "teacher__prefetch_steps": 0, **layout(1, 2)}
    job = dedicated_job(teacher_path, 4, 2, pp=2, shape={"vocab_size": 16384}, **settings)
    t = step_timing(job, CLUSTER)
    cost = window_cost(job, CLUSTER, t)
    # Four windows: three times more that a stage waits for the other. The teacher's stages are alike, and of the
    # student's the last one, with its heads, never waits within a window.
    passing = 2 * 128 * WIDTH / (400e9 * 0.75) + 8e-6
    assert cost.teacher == pytest.approx(3 * (t.teacher_stages[0].teacher + passing))
    first = t.stages[0]
    passing = 2 * 128 * 256 * 4 / (400e9 * 0.75) + 8e-6
    assert cost.student == pytest.approx(3 * (first.forward + first.backward + 2 * passing), rel=1e-6)
    # Messages of the crossing are more, too.
    assert cost.step == pytest.approx(cost.teacher + cost.student + 3 * 8e-6)


def test_one_window_and_one_stage_cost_nothing(teacher_path):
    for settings in ({"teacher__signal_window": 2}, {}):
        job = dedicated_job(teacher_path, 2, 1, **settings)
        cost = window_cost(job, CLUSTER, step_timing(job, CLUSTER))
        assert (cost.student, cost.teacher) == (0.0, 0.0)


def test_states_that_come_as_stretches_are_put_together_in_the_loss(teacher_path):
    transfers = step_timing(dedicated_job(teacher_path, 4, 2, tp=2, **layout(2, 1)), CLUSTER).transfers
    assert transfers["teacher to student"].link_bytes == STEP * WIDTH / 2
    # A ring over two ranks sends half of the whole.
    assert transfers["teacher's states, student's tensor ranks"].link_bytes == STEP * WIDTH / 2
    assert (
        "teacher's states, student's tensor ranks"
        not in step_timing(dedicated_job(teacher_path, 3, 2, tp=2), CLUSTER).transfers
    )


def test_a_teacher_that_only_measures_has_ranks_and_no_time(teacher_path):
    plan = build_plan(dedicated_job(teacher_path, 2, 1, distill__kd_weight=0.0, data__valid_fraction=0.1), CLUSTER)
    figures = plan.to_dict()
    assert plan.timing.teacher == plan.timing.crossing == 0.0 and plan.timing.student_waits == 0.0
    assert figures["teacher_stages"][0]["flops_per_microbatch"]["teacher"] == 0.0


def test_a_sweep_lays_each_side_over_its_ranks(teacher_path):
    job = dedicated_job(teacher_path, 8, 4, teacher__parallel={})
    candidates, refused = sweep(job.config, 8, CLUSTER)
    sizes = [c.plan.job.student.layout for c in candidates]
    assert {(layout.tp, layout.pp) for layout in sizes} == {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)}
    assert not refused and all(layout.tp * layout.pp * layout.dp == 4 for layout in sizes)
    times = [c.plan.timing.seconds for c in candidates]
    assert times == sorted(times)
    for candidate in candidates:
        # What a line says to set leads to that plan, and no other layout of the teacher to a faster one.
        settings = candidate.settings()
        again = build_plan(build_job(with_settings(job.config, settings), 8, "cuda"), CLUSTER)
        assert again.to_dict() == candidate.plan.to_dict()
        for tp, pp in ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)):
            section = "teacher.parallel"
            other = {
                f"{section}.tensor_model_parallel_size": tp, f"{section}.pipeline_model_parallel_size": pp,
                f"{section}.sequence_parallel": tp > 1,
            }  # fmt: skip
            plan = build_plan(build_job(with_settings(job.config, settings | other), 8, "cuda"), CLUSTER)
            ours = candidate.plan.timing
            assert ours.teacher + ours.crossing <= 1.000001 * (plan.timing.teacher + plan.timing.crossing)


def test_a_sweep_keeps_what_the_file_says_of_the_teacher(teacher_path):
    job = dedicated_job(teacher_path, 8, 4, teacher__parallel={"pipeline_model_parallel_size": 2})
    candidates, _ = sweep(job.config, 8, CLUSTER)
    assert candidates
    for candidate in candidates:
        assert candidate.plan.job.teacher is not None and candidate.plan.job.teacher.layout.pp == 2


def test_a_teacher_that_does_not_fit_one_rank_is_cut(teacher_path):
    job = dedicated_job(teacher_path, 3, 2, teacher__parallel={})
    assert job.teacher is not None
    peak = teacher_memory(job)[0].peak
    cluster = CLUSTER.model_copy(update={"memory_gib": 0.9 * peak / 2**30})
    best = sweep(job.config, 3, cluster)[0][0].plan
    assert best.job.teacher is not None and best.job.teacher.layout.dp == 1
    assert max(stage.peak for stage in best.teacher_memory) < 0.9 * peak


def test_a_sweep_without_ranks_for_the_student_is_refused(teacher_path):
    job = dedicated_job(teacher_path, 8, 4)
    with pytest.raises(UserError, match="teacher.ranks is 4 and the run has 4 ranks"):
        sweep(job.config, 4, CLUSTER)


def test_a_teacher_that_does_not_fit_is_told_how_it_would(teacher_path):
    plan = build_plan(dedicated_job(teacher_path, 4, 2, optimizer__overlap_grad_reduce=True), CLUSTER)
    teachers = max(stage.peak for stage in plan.teacher_memory)
    wide = max(stage.peak for stage in plan.memory)
    assert teachers < wide
    # A student that needs next to nothing beside it.
    small = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 32, "vocab_size": 128}
    job = dedicated_job(teacher_path, 4, 2, shape=small)
    plan = build_plan(job, CLUSTER)
    assert max(stage.peak for stage in plan.memory) < 0.9 * teachers
    plan = build_plan(job, CLUSTER.model_copy(update={"memory_gib": 0.95 * teachers / 2**30}))
    assert not plan.fits
    lines = advise(plan)
    assert lines[0] == "it fits with one of these:"
    assert any("teacher.parallel.tensor_model_parallel_size=2" in line for line in lines)
    assert any("teacher.parallel.pipeline_model_parallel_size=2" in line for line in lines)
    assert not any("offload" in line or "teacher.ranks" in line for line in lines)


def test_sides_that_both_do_not_fit_are_mended_one_after_the_other(teacher_path):
    shape = {"num_layers": 2, "hidden_size": 192, "ffn_hidden_size": 192, "vocab_size": 128}
    job = dedicated_job(teacher_path, 4, 2, data__micro_batch_size=1, shape=shape)
    plan = build_plan(job, CLUSTER)
    least = 0.97 * min(max(stage.peak for stage in side) for side in (plan.memory, plan.teacher_memory))
    lines = advise(build_plan(job, CLUSTER.model_copy(update={"memory_gib": least / 2**30})))
    settings = "\n".join(lines)
    assert lines[0].startswith("it fits with all of these")
    assert "teacher.signal_window" in settings and "optimizer.use_distributed_optimizer" in settings


def test_a_teacher_that_is_not_ahead_is_told(teacher_path):
    job = dedicated_job(teacher_path, 4, 2, teacher__prefetch_steps=0)
    (line,) = (line for line in advise(build_plan(job, CLUSTER)) if line.startswith("less waiting with"))
    assert "less waiting with teacher.prefetch_steps=1: " in line or "less waiting with teacher.ranks=" in line


def test_ranks_that_wait_are_given_to_the_other_side(teacher_path):
    # Six ranks of a small teacher wait for two of the student's.
    job = dedicated_job(teacher_path, 8, 6, data__global_batch_size=48, shape={"num_layers": 32})
    plan = build_plan(job, CLUSTER)
    assert plan.timing.teacher_waits > 0
    (line,) = (line for line in advise(plan) if line.startswith("less waiting with"))
    found = int(line.split("teacher.ranks=")[1].split(":")[0])
    assert found < 6
    better = build_plan(build_job(with_settings(job.config, {"teacher.ranks": found}), 8, "cpu"), CLUSTER)
    assert better.timing.seconds < plan.timing.seconds and f"{better.timing.seconds:.3g} s" in line
