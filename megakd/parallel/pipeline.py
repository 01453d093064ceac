"""The one place that calls megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.utils import get_model_config

from megakd.parallel.mesh import ModelMesh

ForwardStep = Callable[[Any, torch.nn.Module], tuple[Any, Callable[..., Any]]]


class GradientWindows:
    """A step in several calls of `run_pipeline`: gradients add up, and are finalised once, at the end of the last.

    Finalising divides them by the sum of weights, over all calls and data ranks.

    Args:
        count: calls of the step.
    """

    def __init__(self, count: int) -> None:
        self._left = count
        self._weight_sum: torch.Tensor | None = None  # of this rank, fp64; None before the last stage's first loss

    def with_weights(self, forward_step: ForwardStep) -> ForwardStep:
        """A forward step for the schedule, which counts in whole numbers: the losses' weights are added up here."""

        def step(microbatches: Any, model: torch.nn.Module) -> tuple[Any, Callable[..., Any]]:
            output, function = forward_step(microbatches, model)

            def loss(output: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
                total, weight_sum, record = function(output)
                self._weight_sum = weight_sum if self._weight_sum is None else self._weight_sum + weight_sum
                return total, torch.zeros([], dtype=torch.int), record

            return output, loss

        return step

    @contextmanager
    def window(self, model: torch.nn.Module) -> Iterator[None]:
        """Around one call's schedule; `model` is megatron-core's DistributedDataParallel."""
        assert self._left > 0, "more windows than the step has"
        self._left -= 1
        is_last = self._left == 0
        config = get_model_config(model)
        finalize, no_sync = config.finalize_model_grads_func, config.no_sync_func

        def collect(model: Any, num_tokens: torch.Tensor, **settings: Any) -> None:
            if is_last:
                # megatron-core hears the last stage's sum on the others, adds up data ranks and divides.
                weights = torch.zeros_like(num_tokens, dtype=torch.float64)
                finalize(model, weights if self._weight_sum is None else weights + self._weight_sum, **settings)

        config.finalize_model_grads_func = collect
        if not is_last:
            # The schedule would let the reduction begin with its last microbatch.
            config.no_sync_func = None
        try:
            with nullcontext() if is_last else model.no_sync():  # type: ignore[operator]
                yield
        finally:
            config.finalize_model_grads_func, config.no_sync_func = finalize, no_sync


def run_pipeline(
    mesh: ModelMesh,
    model: torch.nn.Module,
    forward_step: ForwardStep,
    microbatches: Iterable[Any],
    *,
    num_microbatches: int,
    micro_batch_size: int,
    sequence_length: int,
    forward_only: bool = False,
    windows: GradientWindows | None = None,
) -> list[Any]:
    """Run microbatches through the model's stages, one forward one backward in turn, and finalise gradients.

    Args:
        windows: the step that these microbatches are a part of, where they are not all of it.
        forward_step: called as `forward_step(iterator, model)` on every stage; returns the stage's output and a
            function of it, called on the last stage. In training that function returns (loss sum, sum of weights in
            fp64, record); with `forward_only` it returns the record alone.
        microbatches: what the iterator yields, `num_microbatches` of them, on every stage alike.

    Returns:
        The records in order on the last stage, an empty list on the others.
    """
    if windows is None and not forward_only:
        windows = GradientWindows(1)
    arguments: dict[str, Any] = {
        "forward_step_func": (
            _with_tensor_output(forward_step) if windows is None else windows.with_weights(forward_step)
        ),
        "data_iterator": iter(microbatches),
        "model": model,
        "num_microbatches": num_microbatches,
        "seq_length": sequence_length,
        "micro_batch_size": micro_batch_size,
        "forward_only": forward_only,
        "collect_non_loss_data": forward_only,
        "pg_collection": mesh.groups,
    }
    with nullcontext() if windows is None else windows.window(model):
        if mesh.pp_size == 1:
            return forward_backward_no_pipelining(**arguments)
        communicator = P2PCommunicator(pp_group=mesh.groups.pp, config=get_model_config(model))
        return forward_backward_pipelining_without_interleaving(**arguments, p2p_communicator=communicator)


def _with_tensor_output(forward_step: ForwardStep) -> ForwardStep:
    """For a model with experts the schedules ask what a stage returns for its device, so it may not be a tuple."""

    def step(microbatches: Any, model: torch.nn.Module) -> tuple[Any, Callable[..., Any]]:
        output, function = forward_step(microbatches, model)
        if not isinstance(output, tuple):
            return output, function
        return output[0], lambda _, **settings: function(output, **settings)

    return step
