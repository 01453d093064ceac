"""What megatron-core asks of torch.cuda is answered with CPU tensors, once; inside a worker, where it is applied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def devices() -> dict[str, str]:
    """Where tensors land that are asked for on a GPU in each of the ways megatron-core asks."""
    source = torch.arange(3)
    return {
        "current_device": str(torch.cuda.current_device()),
        "zeros": str(torch.zeros(2, device="cuda").device),
        "tensor": str(torch.tensor([1.0], device="cuda:0").device),
        "empty_at_current_device": str(torch.empty(2, device=torch.cuda.current_device()).device),
        "ones_like": str(torch.ones_like(source, device="cuda").device),
        "to": str(source.to("cuda").device),
        "to_keyword": str(source.to(device="cuda", dtype=torch.float32).device),
        "tensor_cuda": str(source.cuda().device),
        "module_cuda": str(next(torch.nn.Linear(2, 2).cuda().parameters()).device),
    }


def test_every_way_to_ask_for_a_gpu_gives_the_cpu(run_ranks: Callable[..., list[Any]]) -> None:
    assert set(run_ranks(1, devices)[0].values()) == {"cpu"}


def other_devices() -> tuple[str, str, torch.dtype]:
    return (
        str(torch.zeros(2, device="meta").device),
        str(torch.zeros(2).to("meta").device),
        torch.zeros(2).to(torch.bfloat16).dtype,
    )


def test_other_devices_and_dtypes_are_left_alone(run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(1, other_devices)[0] == ("meta", "meta", torch.bfloat16)


def type_names() -> tuple[str, str, torch.dtype]:
    return (
        torch.zeros(1).type(),
        torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16)).type(),
        torch.zeros(1).type(torch.int32).dtype,
    )


def test_parameters_look_like_those_of_a_gpu(run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(1, type_names)[0] == ("torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor", torch.int32)


def streams_and_events() -> bool:
    stream, event = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.current_stream())
        event.record()
    stream.wait_event(event)
    event.synchronize()
    torch.cuda.synchronize()
    torch.cuda.set_device(0)
    torch.cuda.empty_cache()
    return True


def test_streams_do_nothing(run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(1, streams_and_events) == [True]


def drawn_twice() -> list[bool]:
    """Whether the state of the GPU's generator is the CPU's: saved, drawn from, restored, drawn from again."""
    import megatron.core.tensor_parallel.random as megatron_random

    equal = []
    for get, put in [
        (torch.cuda.get_rng_state, torch.cuda.set_rng_state),
        (megatron_random._get_cuda_rng_state, megatron_random._set_cuda_rng_state),
    ]:
        state = get()
        first = torch.rand(4)
        put(state)
        equal += [torch.equal(torch.rand(4), first), not torch.equal(torch.rand(4), first)]
    torch.cuda.manual_seed(5)
    seeded = torch.rand(4)
    torch.manual_seed(5)
    return [*equal, torch.equal(torch.rand(4), seeded)]


def test_one_generator_plays_both_roles(run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(1, drawn_twice) == [[True] * 5]


def applied_again() -> bool:
    from megakd.platform.cpu_substitutes import apply_cpu_substitutes

    before = (torch.zeros, torch.Tensor.to, torch.Tensor.type, torch.cuda.current_device)
    apply_cpu_substitutes()
    return before == (torch.zeros, torch.Tensor.to, torch.Tensor.type, torch.cuda.current_device)


def test_they_are_applied_once(run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(1, applied_again) == [True]
