"""Rules between a model's shape and a layout: one small function each, one line where it fails."""

from __future__ import annotations

import math
from typing import Literal

from megakd.common.errors import UserError
from megakd.config.architecture import GPTArchitecture
from megakd.config.schema import ParallelSection
from megakd.config.wording import either

Role = Literal["student", "teacher"]


def check_architecture(
    role: Role,
    architecture: GPTArchitecture,
    parallel: ParallelSection,
    sequence_length: int,
    *,
    has_stage_split: bool,
    divisible_by: int = 128,
    section: str = "parallel",
) -> None:
    """Hold a model's shape against the layout and the sequence length.

    Args:
        section: where the layout is set, for messages.
        has_stage_split: `num_layers_in_first_pipeline_stage` and `..._last_...` apply to this model.
        divisible_by: the vocabulary is padded to a multiple of this.

    Raises:
        UserError: the first rule that fails.
    """
    check_positions(role, architecture, sequence_length)
    check_tensor_split(role, architecture, parallel.tensor_model_parallel_size, section)
    check_vocabulary_split(role, architecture, parallel.tensor_model_parallel_size, divisible_by, section)
    if role == "student":
        check_experts(architecture, parallel)
    if has_stage_split:
        check_layer_split(
            role,
            architecture.num_layers,
            parallel.pipeline_model_parallel_size,
            parallel.num_layers_in_first_pipeline_stage,
            parallel.num_layers_in_last_pipeline_stage,
        )
    else:
        stages = parallel.pipeline_model_parallel_size
        check_layer_split(role, architecture.num_layers, stages, None, None, section)


def check_experts(architecture: GPTArchitecture, parallel: ParallelSection) -> None:
    """megatron-core trains experts over tensor ranks with sequence parallelism only."""
    experts, size = architecture.num_moe_experts, parallel.tensor_model_parallel_size
    if experts is not None and size > 1 and not parallel.sequence_parallel:
        raise UserError(
            f"parallel.sequence_parallel is false; a student with experts (num_moe_experts {experts}) needs it with "
            f"tensor_model_parallel_size {size}. Set it to true."
        )


def check_positions(role: Role, architecture: GPTArchitecture, sequence_length: int) -> None:
    """The model has a position for every token of a sample."""
    last = architecture.max_position_embeddings
    if sequence_length > last:
        raise UserError(
            f"data.sequence_length is {sequence_length}; the {role}'s positions end at {last} "
            f"(max_position_embeddings). Use at most {last}."
        )


def check_tensor_split(role: Role, architecture: GPTArchitecture, tensor_size: int, section: str = "parallel") -> None:
    """Heads, key-value heads and the MLP are cut evenly over tensor ranks."""
    parts = {
        "num_attention_heads": architecture.num_attention_heads,
        "num_query_groups": architecture.num_query_groups,
        architecture.mlp_width_field: architecture.mlp_width,
    }
    for name, value in parts.items():
        if value % tensor_size == 0:
            continue
        common = math.gcd(*parts.values())
        usable = [str(size) for size in range(1, min(common, 128) + 1) if common % size == 0]
        # megatron-core would keep copies of a key-value head on several ranks; conversion and loading do not.
        copies = " (copies of a group on several ranks are not supported)" if name == "num_query_groups" else ""
        raise UserError(
            f"{section}.tensor_model_parallel_size is {tensor_size}; it must divide the {role}'s {name}, {value}"
            f"{copies}. Use {either(usable)}."
        )


def check_vocabulary_split(
    role: Role, architecture: GPTArchitecture, tensor_size: int, divisible_by: int, section: str = "parallel"
) -> None:
    """The padded vocabulary is cut evenly over tensor ranks."""
    vocab = architecture.vocab_size
    padded = math.ceil(vocab / divisible_by) * divisible_by
    if padded % tensor_size:
        remedy = "Use another size"
        if role == "student":
            remedy += f", or set student.make_vocab_size_divisible_by to {math.lcm(divisible_by, tensor_size)}"
        raise UserError(
            f"{section}.tensor_model_parallel_size is {tensor_size}; it must divide the {role}'s padded vocabulary, "
            f"{padded} (vocab_size {vocab} up to a multiple of {divisible_by}). {remedy}."
        )


def check_layer_split(
    role: Role, num_layers: int, stages: int, first: int | None, last: int | None, section: str = "parallel"
) -> None:
    """Stages without a number of their own share the layers that are left evenly, at least one each.

    `first` and `last` are the layers of the first and last pipeline stage, None for an equal share.
    """
    named = {
        f"parallel.num_layers_in_{place}_pipeline_stage": value
        for place, value in (("first", first), ("last", last))
        if value is not None
    }
    left, sharing = num_layers - sum(named.values()), stages - len(named)
    if sharing == 0 and left == 0 or sharing > 0 and left > 0 and left % sharing == 0:
        return
    if not named:
        usable = [str(size) for size in range(1, num_layers + 1) if num_layers % size == 0]
        remedy = "or give the first or the last stage its own number of layers" if role == "student" else ""
        raise UserError(
            f"{section}.pipeline_model_parallel_size is {stages}; it must divide the {role}'s {num_layers} layers"
            f"{'' if role == 'student' else ', whose stages are always equal'}. Use {either(usable)}"
            f"{', ' + remedy if remedy else ''}."
        )
    given = " and ".join(f"{key} is {value}" for key, value in named.items())
    if sharing == 0:
        rule = f"with 2 stages they must add up to the {role}'s {num_layers} layers"
    else:
        others = "the other stage" if sharing == 1 else f"each of the {sharing} other stages"
        rule = (
            f"that leaves {left} of the {role}'s {num_layers} layers, and {others} of "
            f"parallel.pipeline_model_parallel_size {stages} must get {'' if sharing == 1 else 'the same number, '}"
            "at least 1"
        )
    raise UserError(f"{given}; {rule}. Change {' or '.join(named)}.")
