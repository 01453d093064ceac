"""Parts of sentences that several rules' messages are made of."""

from __future__ import annotations

from megakd.config.schema import ParallelSection


def ranks_per_replica(parallel: ParallelSection) -> int:
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size


def replica(parallel: ParallelSection) -> str:
    """Its ranks as a product of settings; a size of 1 that need not be said is not."""
    sizes = {
        "tensor_model": parallel.tensor_model_parallel_size,
        "pipeline_model": parallel.pipeline_model_parallel_size,
    }
    if parallel.context_parallel_size > 1:
        sizes["context"] = parallel.context_parallel_size
    return " x ".join(f"{name}_parallel_size {size}" for name, size in sizes.items())


def multiples_around(value: int, step: int) -> list[int]:
    """The multiples of `step` below and above `value`, those above 0."""
    below = value // step * step
    return [below, below + step] if below else [step]


def neighbours(value: int, step: int) -> str:
    """The multiples of `step` around `value`."""
    return either([str(multiple) for multiple in multiples_around(value, step)])


def either(choices: list[str]) -> str:
    return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"
