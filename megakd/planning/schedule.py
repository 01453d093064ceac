"""How long a pipeline takes: its schedule played through with the stages' own durations."""

from __future__ import annotations

from collections.abc import Sequence


def one_forward_one_backward(
    forward: Sequence[float], backward: Sequence[float], passing: Sequence[float], num_microbatches: int
) -> list[float]:
    """Seconds at which each stage has done its last backward pass, under megatron-core's 1F1B.

    Args:
        forward, backward: seconds of each stage for a microbatch.
        passing: seconds from each stage to the next, one fewer; the same on the way back.
    """
    stages = len(forward)
    orders = [_order(stages - stage, num_microbatches) for stage in range(stages)]
    done: dict[tuple[int, bool, int], float] = {}
    clock, position = [0.0] * stages, [0] * stages
    left = sum(len(order) for order in orders)
    while left:
        moved = False
        for stage, order in enumerate(orders):
            while position[stage] < len(order):
                is_forward, index = order[position[stage]]
                ready = _ready(done, stage, stages, is_forward, index, passing)
                if ready is None:
                    break
                duration = forward[stage] if is_forward else backward[stage]
                clock[stage] = max(clock[stage], ready) + duration
                done[stage, is_forward, index] = clock[stage]
                position[stage] += 1
                left -= 1
                moved = True
        assert moved, "the schedule waits for itself"
    return clock


def forward_only(forward: Sequence[float], passing: Sequence[float], num_microbatches: int) -> float:
    """Seconds until the last stage has done its last forward pass."""
    previous = [0.0] * num_microbatches
    for stage, duration in enumerate(forward):
        clock = 0.0
        for index in range(num_microbatches):
            clock = max(clock, previous[index]) + duration
            previous[index] = clock + (passing[stage] if stage < len(passing) else 0.0)
    return previous[-1]


def _order(from_last: int, num_microbatches: int) -> list[tuple[bool, int]]:
    """A stage's passes in turn; `from_last` is 1 for the last stage."""
    ahead = min(from_last - 1, num_microbatches)
    order = [(True, index) for index in range(ahead)]
    for index in range(num_microbatches - ahead):
        order += [(True, ahead + index), (False, index)]
    return order + [(False, index) for index in range(num_microbatches - ahead, num_microbatches)]


def _ready(
    done: dict[tuple[int, bool, int], float],
    stage: int,
    stages: int,
    is_forward: bool,
    index: int,
    passing: Sequence[float],
) -> float | None:
    """When a pass's input is there; None while that is not known."""
    before = stage - 1 if is_forward else stage + 1
    if before < 0:
        return 0.0
    if before == stages:
        return done.get((stage, True, index))
    arrived = done.get((before, is_forward, index))
    return None if arrived is None else arrived + passing[min(stage, before)]
