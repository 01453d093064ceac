"""The Triton kernels against the definitions, in Triton's interpreter on CPU and, marked gpu, compiled."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import Tensor

from megakd.losses import token_statistics
from megakd.losses.divergences import DIVERGENCES
from megakd.losses.kernels import kernels_available
from megakd.losses.shards import VocabularyShard
from tests.losses.kernel_cases import (
    Tokens,
    assert_rounded,
    assert_tokens,
    by_hand,
    by_loss,
    by_work,
    extreme_case,
    figures_of,
    in_bfloat16,
    logit_case,
    on_gloo,
    padding_left_alone,
    signal_of,
    softcapped_label_logits,
    without_gradient,
)
from tests.losses.reference import Case, make_case, relative, solve
from tests.losses.test_distillation import assert_close

# Only workers import triton: what it makes of a kernel is settled by the environment when it is first imported.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

NAMES = sorted(DIVERGENCES)
over_divergences = pytest.mark.parametrize("divergence", NAMES)

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tempered": {"temperature": 2.0},
    "kd-tempered": {"temperature": 0.5, "ce_weight": 0.0},
    "two-temperatures": {"temperature": 1.0, "teacher_temperature": 1.7, "temperature_squared": False},
    "ce-alone": {"kd_weight": 0.0, "temperature": 0.8},
    "parameters": {"jsd_beta": 0.15, "skew_alpha": 0.6, "temperature": 0.8, "teacher_temperature": 2.0},
    "forms": {"student_logit_scale": 1.3, "student_logit_softcap": 4.0, "teacher_logit_scale": 0.6},
    "tempered-forms": {
        "temperature": 1.5,
        "student_logit_scale": 0.5,
        "teacher_logit_softcap": 3.0,
        "student_logit_softcap": 2.5,
    },
}


def _start_worker() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def submit() -> Iterator[Callable[..., Future[Any]]]:
    """Runs a function of kernel_cases in one of two processes whose triton interprets kernels."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=_start_worker) as pool:
        yield pool.submit


@over_divergences
def test_losses_and_gradients_equal_the_definition(submit, divergence):
    # What a setting changes beside the formula is one code for all of them: two formulas go through everything.
    chosen = SETTINGS if divergence in ("forward_kl", "jsd") else ("plain", "parameters", "tempered-forms")
    cases = [logit_case(1, divergence=divergence, **SETTINGS[name]) for name in chosen]
    futures = [submit(by_work, case) for case in cases]
    for case, future in zip(cases, futures, strict=True):
        assert_tokens(case, future.result())


@pytest.mark.parametrize("settings", [{}, SETTINGS["forms"]], ids=["plain", "forms"])
def test_cross_entropy_without_a_teacher(submit, settings):
    case = logit_case(2, with_teacher=False, kd_weight=0.0, ce_weight=1.5, **settings)
    assert_tokens(case, submit(by_work, case).result())


@pytest.mark.parametrize("divergence", ["forward_kl", "tvd"])
def test_the_loss_with_kernels_equals_the_definition(submit, divergence):
    case = make_case(
        17, rows=9, padded=560, vocab_size=551, dtype=torch.float32, divergence=divergence, temperature=2.0
    )
    assert_close(submit(by_loss, case).result(), solve(case), 2e-6)


@over_divergences
def test_figures_equal_the_torch_path(submit, divergence):
    case = logit_case(3, divergence=divergence, temperature=1.5, student_logit_softcap=6.0)
    settings = case.settings()
    for name in ("kd_weight", "ce_weight", "temperature_squared"):
        del settings[name]
    expected = token_statistics(
        case.hidden, case.head, case.labels, case.token_weights, signal_of(case), **settings, tp_group=None
    )
    actual = submit(by_work, case).result()
    assert relative(actual.kd, expected.kd) <= 2e-6
    counted = case.token_weights != 0
    assert relative(actual.ce[counted], expected.ce[counted]) <= 2e-6


@over_divergences
def test_shards_with_padding_and_of_padding(submit, divergence):
    layout = {"rows": 3, "padded": 4 * 40, "vocab_size": 95, "divergence": divergence}
    cases = [logit_case(4, **layout), logit_case(4, **layout, **SETTINGS["tempered-forms"])]
    futures = [submit(by_hand, case, 4) for case in cases]
    for case, future in zip(cases, futures, strict=True):
        assert_tokens(case, future.result())


@over_divergences
def test_logits_of_ten_thousand(submit, divergence):
    cases = [extreme_case(divergence, temperature) for temperature in (1.0, 2.0)]
    futures = [submit(by_hand, case, 2) for case in cases]
    for case, future in zip(cases, futures, strict=True):
        # A reverse KL of 1e4 in fp32 leaves 5e-4 of rounding in each ln q - ln p of a gradient that sums to 0.
        assert_tokens(case, future.result(), 5e-6 if divergence == "reverse_kl" else 2e-6)


@over_divergences
def test_equal_models_score_nothing_and_move_nothing(submit, divergence):
    case = logit_case(7, divergence=divergence, kd_weight=1.0, ce_weight=0.0, temperature=2.0)
    case = dataclasses.replace(case, teacher_hidden=case.hidden)
    actual = submit(by_work, case).result()
    assert actual.kd.abs().max() <= 1e-6 and actual.gradient.abs().max() <= 1e-6


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_a_bfloat16_head_has_bfloat16_gradients(submit, divergence):
    case = in_bfloat16(logit_case(8, divergence=divergence))
    assert_rounded(case, submit(by_work, case).result(), 2**-7)  # the interpreter cuts bits off


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_without_a_gradient_the_losses_are_the_same(submit, divergence):
    case = logit_case(8, divergence=divergence)
    alone, whole = submit(without_gradient, case), submit(by_work, case).result()
    kd, ce, gradient = alone.result()
    assert gradient is None and torch.equal(kd, whole.kd[1:3]) and torch.equal(ce, whole.ce[1:3])


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_each_figure_equals_its_definition(submit, divergence):
    case = logit_case(9, divergence=divergence, temperature=1.6, teacher_temperature=0.9, teacher_logit_scale=1.2)
    figures = submit(figures_of, case, None).result()
    z, u = case.hidden.double()[:, :75], 1.2 * case.teacher_hidden.double()[:, :75]
    held = case.labels >= 0
    a, b = (z - z.amax(1, keepdim=True)) / 1.6, (u - u.amax(1, keepdim=True)) / 0.9
    ratio = b - a
    means = {"forward_kl": (b.softmax(1) * ratio).sum(1), "reverse_kl": -(a.softmax(1) * ratio).sum(1)}
    expected = [
        z.gather(1, case.labels.clamp(min=0)[:, None])[:, 0] * held,
        z.amax(1),
        a.logsumexp(1),
        (1.6 * a).logsumexp(1),
        u.amax(1),
        b.logsumexp(1),
        means.get(divergence, torch.zeros(4)),
    ]
    for column, definition in zip(figures.unbind(), expected, strict=True):
        assert relative(column, definition) <= 5e-7


@pytest.mark.parametrize("divergence", ["reverse_kl", "tvd"])
def test_a_shard_of_padding_has_finite_figures(submit, divergence):
    case = logit_case(10, rows=3, divergence=divergence)
    case.hidden[0], case.teacher_hidden[1] = torch.nan, torch.nan
    shard = VocabularyShard(None, 2, 1, 80, 80, 0, 80)
    figures = submit(figures_of, case, shard).result()
    assert torch.equal(figures, torch.tensor([[0.0, -1e30, 0.0, 0.0, -1e30, 0.0, 0.0]]).T.expand(7, 3))


def test_a_softcap_keeps_small_and_large_logits(submit):
    values = torch.logspace(-6, 4, 60)
    values[::2] *= -1.0
    actual = submit(softcapped_label_logits, values, 3.0).result()
    torch.testing.assert_close(actual.double(), 3.0 * torch.tanh(values.double() / 3.0), rtol=4e-7, atol=0.0)


def test_padded_columns_may_hold_anything_and_logits_are_not_written(submit):
    case = logit_case(12, rows=2, divergence="jsd", **SETTINGS["tempered-forms"])
    assert submit(padding_left_alone, case).result() == [True, True, True]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "skew_reverse_kl"])
def test_two_gloo_ranks(submit, divergence, tmp_path):
    case = logit_case(13, divergence=divergence, temperature=2.0)
    futures = [submit(on_gloo, case, rank, str(tmp_path / "store")) for rank in range(2)]
    first, second = (future.result(timeout=60) for future in futures)
    assert torch.equal(first.kd, second.kd) and torch.equal(first.ce, second.ce)
    assert_tokens(case, Tokens(first.kd, first.ce, torch.cat([first.gradient, second.gradient], dim=1)))


def test_float64_is_refused(submit):
    case = logit_case(14)
    case = dataclasses.replace(case, hidden=case.hidden.double(), head=case.head.double())
    with pytest.raises(TypeError, match="compute in float32.*Use the torch path"):
        submit(by_work, case).result()


def test_nothing_imports_triton_until_kernels_run():
    code = (
        "import torch, sys; before = set(sys.modules); import megakd.losses, megakd.losses.kernels as k; "
        "k.kernels_available(torch.device('cuda')); assert not [m for m in set(sys.modules) - before if m == 'triton']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert kernels_available(torch.device("cuda")) and not kernels_available(torch.device("cpu"))


def compiled(case: Case) -> Tokens:
    moved = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in vars(case).items()}
    actual = by_work(Case(**moved), step=128, block=None)
    return Tokens(actual.kd.cpu(), actual.ce.cpu(), actual.gradient.cpu())


@pytest.mark.gpu
@over_divergences
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_compiled_kernels_equal_the_definition(divergence, settings):
    case = logit_case(15, rows=300, padded=4224, vocab_size=4211, divergence=divergence, **settings)
    # The device's exponential is approximate: 2 units in the last place, and more below e^-10.
    assert_tokens(case, compiled(case), 5e-6)


@pytest.mark.gpu
def test_compiled_kernels_round_to_the_nearest_bfloat16():
    case = in_bfloat16(logit_case(16, rows=40, padded=1024, vocab_size=1001))
    assert_rounded(case, compiled(case), 2**-8)
