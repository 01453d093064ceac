"""The played-through pipeline against what is known of it."""

from __future__ import annotations

import pytest

from megakd.planning.schedule import forward_only, one_forward_one_backward


@pytest.mark.parametrize(("stages", "count"), [(1, 1), (1, 7), (2, 1), (2, 8), (4, 4), (4, 16), (8, 3), (16, 64)])
def test_equal_stages_take_the_textbook_time(stages, count):
    ends = one_forward_one_backward([1.0] * stages, [2.0] * stages, [0.0] * (stages - 1), count)
    assert max(ends) == pytest.approx((count + stages - 1) * 3.0)  # Narayanan et al. 2021, section 2.2
    assert forward_only([1.0] * stages, [0.0] * (stages - 1), count) == pytest.approx(count + stages - 1)


def test_the_slowest_stage_sets_the_pace():
    even = max(one_forward_one_backward([1.0, 1.0], [2.0, 2.0], [0.0], 100))
    heavy = max(one_forward_one_backward([1.0, 1.5], [2.0, 2.0], [0.0], 100))
    assert heavy - even == pytest.approx(100 * 0.5, abs=1.0)


def test_passing_takes_its_time():
    # Forward over both boundaries and back again; nothing overlaps with a single microbatch.
    assert one_forward_one_backward([1.0] * 3, [2.0] * 3, [0.25, 0.5], 1)[0] == pytest.approx(9.0 + 2 * 0.75)
    assert forward_only([1.0] * 3, [0.25, 0.5], 1) == pytest.approx(3.75)
