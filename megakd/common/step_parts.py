"""The parts that a training step's time is shared out among, for what measures, writes and draws them."""

from __future__ import annotations

from collections.abc import Mapping

DATA, TEACHER, FORWARD, BACKWARD = "data", "teacher", "forward", "backward"
LOSS, COMMUNICATION, OPTIMIZER, OTHER = "loss", "communication", "optimizer", "other"

# In the order of a step, with what counts as each.
STEP_PARTS = {
    DATA: "waiting for the step's microbatches and moving them to the device",
    TEACHER: "the teacher's forward pass and communication; nothing out of a cache, which is read with the data",
    FORWARD: "the student's forward pass up to the loss",
    LOSS: "the fused loss, which computes both heads' logits and the gradients by them, and its backward pass",
    BACKWARD: "the student's backward pass behind the loss",
    COMMUNICATION: "the student's: starting to send and waiting for other ranks, whatever they are doing meanwhile",
    OPTIMIZER: "zeroing, scaling, checking and clipping gradients, and the update",
    OTHER: "the schedule and what is left",
}


def seconds_key(part: str) -> str:
    """The key of a part's seconds in a step's record."""
    return f"{part}_seconds"


def part_seconds(record: Mapping[str, object]) -> dict[str, float] | None:
    """A step's seconds by part out of its record, None where the record has none."""
    found = {part: record.get(seconds_key(part)) for part in STEP_PARTS}
    numbers = {part: float(value) for part, value in found.items() if isinstance(value, int | float)}
    return numbers if len(numbers) == len(STEP_PARTS) else None
