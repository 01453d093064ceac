"""Nothing of a run asks megatron-core's global parallel state where it is: every group comes from the model's mesh."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from tests.training.runs import build, layout, run_values, write_run_files

# Why each cannot be avoided; all others raise.
ALLOWED = {
    "get_global_memory_buffer": "sequence-parallel linear layers gather their input into it; it holds no group",
    "is_initialized": "layers ask whether there is a global state at all; there is none, and they take their own group",
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2_pp2_sequence_parallel": (4, layout(2, 2, parallel__sequence_parallel=True)),
    "pp2_full_recompute": (2, layout(1, 2, student__recompute_granularity="full")),
    "tp2_selective_recompute": (2, layout(2, 1, student__recompute_granularity="selective")),
    "dp2_overlapped": (
        2,
        layout(
            optimizer__use_distributed_optimizer=True,
            optimizer__overlap_grad_reduce=True,
            optimizer__overlap_param_gather=True,
        ),
    ),
}


@contextmanager
def getters_forbidden() -> Iterator[list[str]]:
    """Every getter of parallel_state raises, under whichever name a module of megatron-core holds it.

    Yields the allowed getters that were called. One that a caller swallows is told at the end.
    """
    from megatron.core import parallel_state

    calls: list[str] = []
    forbidden: list[str] = []

    def wrapped(name: str, getter: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(getter)
        def call(*args: Any, **kwargs: Any) -> Any:
            if name not in ALLOWED:
                forbidden.append(name)
                raise AssertionError(f"megatron-core's global state was asked: parallel_state.{name}")
            calls.append(name)
            return getter(*args, **kwargs)

        return call

    getters = {
        getter: wrapped(name, getter)
        for name, getter in vars(parallel_state).items()
        if isinstance(getter, FunctionType)
        and getter.__module__ == parallel_state.__name__
        and (name.startswith(("get_", "is_")) or name == "model_parallel_is_initialized")
    }
    assert len(getters) > 50, "the getters are named otherwise"
    replaced = []
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith(("megatron", "megakd")):
            for name, value in list(vars(module).items()):
                if isinstance(value, FunctionType) and value in getters:
                    replaced.append((module, name, value))
                    setattr(module, name, getters[value])
    try:
        yield calls
        assert not forbidden, f"asked and the error swallowed: {sorted(set(forbidden))}"
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


def run_without_getters(values: dict[str, Any], checkpoints: Path) -> tuple[list[float], list[str]]:
    """Build, train, save, load and score under `getters_forbidden`: the losses, and the allowed getters called."""
    from megakd.evaluation import evaluate
    from megakd.training import loop  # noqa: F401  so that all modules a run imports are there to be searched

    with getters_forbidden() as calls:
        run = build(values)
        losses = run.train(0, 2)
        run.save(checkpoints, 2, tokens=7)
        assert run.load(checkpoints) == {"tokens": 7}
        batches = run.batches()
        evaluate(
            run.student.model, run.mesh, batches.microbatches(0), run.teacher, vocab_size=run.objective.vocab_size,
            chunk_mib=None, sequence_parallel=run.student.sequence_parallel, window=8,
        )  # fmt: skip
        batches.close()
    return losses, calls


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_files(tmp_path_factory.mktemp("files"), tied=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_getter_of_the_global_state_is_called(
    name: str, folder: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    world_size, settings = LAYOUTS[name]
    results = run_ranks(world_size, run_without_getters, run_values(folder, **settings), tmp_path)
    assert len(results[0][0]) == 2
    if name == "tp2_pp2_sequence_parallel":  # else the allow-list is longer than it need be
        assert {call for _, calls in results for call in calls} == set(ALLOWED)


def ask_through_an_imported_name() -> str:
    """A getter that another module of megatron-core imported by name raises, too."""
    from megatron.core.tensor_parallel import layers

    try:
        with getters_forbidden():
            layers.get_tensor_model_parallel_world_size()
    except AssertionError as error:
        return str(error)
    return "answered"


def test_the_guard_reaches_names_imported_elsewhere(run_ranks: Callable[..., list[Any]]) -> None:
    assert "parallel_state.get_tensor_model_parallel_world_size" in run_ranks(1, ask_through_an_imported_name)[0]
