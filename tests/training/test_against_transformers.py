"""First gradient and twenty losses of every layout against a plain transformers loop in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import reference
from tests.training.layout_run import Layout, LayoutResult, run_layout

LAYOUTS = {
    "one_rank": Layout(1),
    "small_microbatches": Layout(1, micro_batch_size=1),
    "selective_recompute": Layout(1, recompute="selective"),
    "tp2": Layout(2, tp=2),
    "tp2_sequence_parallel": Layout(2, tp=2, sequence_parallel=True, micro_batch_size=4),
    "pp2": Layout(2, pp=2, micro_batch_size=1),
    "pp2_uneven": Layout(2, pp=2, first_stage=3),
    "dp2": Layout(2),
    "dp2_distributed_optimizer": Layout(2, distributed_optimizer=True),
    "dp2_overlapped": Layout(2, distributed_optimizer=True, overlap=True),
    "tp2_pp2": Layout(4, tp=2, pp=2),
    "tp2_pp2_sequence_parallel_recompute": Layout(4, tp=2, pp=2, sequence_parallel=True, recompute="full"),
    "tp2_dp2_distributed_optimizer": Layout(4, tp=2, distributed_optimizer=True, overlap=True),
}


class Case:
    """Models on disk and what plain transformers does with them."""

    def __init__(self, folder: Path, tied: bool) -> None:
        self.student, self.teacher = folder / "student", folder / "teacher"
        reference.save_model(self.student, layers=4, hidden=32, tied=tied, seed=1, std=0.1)
        reference.save_model(self.teacher, layers=2, hidden=48, tied=not tied, seed=2, std=0.2)

    def reference_run(self, loss: str) -> reference.ReferenceRun:
        return reference.ReferenceRun(self.student, self.teacher, self._batches(), loss)

    @staticmethod
    def _batches() -> list[torch.Tensor]:
        stream = torch.from_numpy(reference.token_stream())
        length, count = reference.SEQUENCE, reference.GLOBAL_BATCH
        windows = [stream[i * length : i * length + length + 1] for i in range(reference.STEPS * count)]
        return [torch.stack(windows[k * count : (k + 1) * count]) for k in range(reference.STEPS)]


@pytest.fixture(scope="module", params=["untied", "tied"])
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Case, reference.ReferenceRun]:
    case = Case(tmp_path_factory.mktemp(request.param), tied=request.param == "tied")
    return case, case.reference_run("forward_kl")


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_as_transformers_does(
    case: tuple[Case, reference.ReferenceRun], name: str, run_ranks: Callable[..., list[Any]]
) -> None:
    models, expected = case
    layout = LAYOUTS[name]
    result = run_ranks(layout.world_size, run_layout, layout, str(models.student), str(models.teacher))[0]
    assert_same_run(result, expected)


@pytest.mark.parametrize("loss", ["reverse_kl", "jsd"])
def test_other_divergences_train_as_transformers_does(
    tmp_path: Path, loss: str, run_ranks: Callable[..., list[Any]]
) -> None:
    case = Case(tmp_path, tied=False)
    layout = Layout(4, tp=2, pp=2, sequence_parallel=True, loss=loss)
    result = run_ranks(layout.world_size, run_layout, layout, str(case.student), str(case.teacher))[0]
    assert_same_run(result, case.reference_run(loss))


def assert_same_run(result: LayoutResult, expected: reference.ReferenceRun) -> None:
    assert set(result.first_gradient) == set(expected.first_gradient)
    for parameter, gradient in expected.first_gradient.items():
        difference = (result.first_gradient[parameter] - gradient).norm()
        # An expert that no token goes to has none.
        assert difference <= 1e-5 * gradient.norm(), f"{parameter}: {difference:.2e} of {gradient.norm():.2e}"
    assert result.losses[0] == pytest.approx(expected.losses[0], rel=1e-6)
    assert result.losses == pytest.approx(expected.losses, rel=1e-4)
    assert result.norms == pytest.approx(expected.norms, rel=1e-3)


def test_reference_learns(case: tuple[Case, reference.ReferenceRun]) -> None:
    losses = case[1].losses
    assert losses[-1] < 0.9 * losses[0]
    assert reference.LR >= 1e-3
