"""What megatron-core 0.16 expects of torch.cuda, answered on a machine without a GPU.

Applied once per process, before megatron-core is imported, never where a GPU is present. megatron-core's files
stay as they are; each substitute says what in megatron-core asks for it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device

_CPU = torch.device("cpu")
_FACTORIES = ("arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like",
              "rand", "randint", "randn", "tensor", "zeros", "zeros_like")  # fmt: skip
_applied = False


def apply_cpu_substitutes() -> None:
    """Make megatron-core's GPU code paths run on CPU tensors. Idempotent."""
    global _applied
    if _applied:
        return
    _applied = True
    _substitute_device_calls()
    _substitute_streams()
    _substitute_device_arguments()
    _substitute_type_names()
    _import_without_compiling()
    _substitute_random_state()


def _substitute_device_calls() -> None:
    # current_device() is passed as `device=` throughout; the schedules synchronise around p2p operations.
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment, return-value]
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None
    # `.cuda()` is called on tied embedding weights, checkpoint tensors and the models themselves.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign, assignment]


class _NoStream:
    """Stands for a CUDA stream or event: everything on CPU happens in program order already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...


def _substitute_streams() -> None:
    # Gradient buffers and p2p communication create streams and events even where they do nothing with them.
    torch.cuda.Stream = torch.cuda.Event = _NoStream  # type: ignore[misc, assignment]
    torch.cuda.current_stream = lambda device=None: _NoStream()  # type: ignore[assignment, return-value]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment, return-value]


def _is_cuda(device: object) -> bool:
    return isinstance(device, str) and device.startswith("cuda")


def _substitute_device_arguments() -> None:
    # Literal device="cuda": token counters in the schedules, FP32Optimizer's scale, gradient norms.
    # torch lists the factories that `with torch.device(...)` redirects on first use: let it list the real ones.
    torch.utils._device._device_constructors()

    def on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = _CPU
            return factory(*args, **kwargs)

        return wrapped

    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    tensor_to = torch.Tensor.to

    @functools.wraps(tensor_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return tensor_to(self, *args, **kwargs)

    torch.Tensor.to = to  # type: ignore[method-assign, assignment]


def _substitute_type_names() -> None:
    # The distributed optimizer and gradient clipping accept only parameters whose type() is torch.cuda.*Tensor.
    tensor_type = torch.Tensor.type

    @functools.wraps(tensor_type)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = tensor_type(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]


def _import_without_compiling() -> None:
    # megatron-core takes torch.compile for its fusions when it is imported. They are off on CPU, and what compiles is
    # as much to import again as torch itself, in every process. torch.compile is left as it was for others.
    torch_compile = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        import megatron.core.jit  # noqa: F401
    finally:
        torch.compile = torch_compile


def _substitute_random_state() -> None:
    # Recomputation saves and restores the CUDA generator; on CPU the default generator plays both roles.
    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(new_state)

    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = get_state
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = set_state
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment]

    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
    # It warns for every parameter that the CPU generator moved inside a CUDA context: here they are one.
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
