"""Where gradients go: one rank, plain and main_grad, either input alone, and by finite differences."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megakd.losses import DenseSignal, LossSums, distillation_loss
from megakd.losses.divergences import DIVERGENCES
from tests.losses.ranks import shard, sharded_signal
from tests.losses.reference import Case, make_case, relative, solve


def fused_loss(case: Case, hidden: Tensor, head: Tensor, **more: Any) -> LossSums:
    signal = None
    if case.teacher_hidden is not None and case.teacher_head is not None:
        signal = DenseSignal(case.teacher_hidden, case.teacher_head)
    return distillation_loss(
        hidden,
        head,
        case.labels,
        case.token_weights,
        signal,
        **case.settings(),
        **more,
    )


def leaves(case: Case) -> tuple[Tensor, Tensor]:
    return case.hidden.clone().requires_grad_(), case.head.clone().requires_grad_()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_finite_differences(temperature):
    case = make_case(1, rows=5, padded=9, vocab_size=7, student_width=4, teacher_width=6, temperature=temperature)
    assert torch.autograd.gradcheck(lambda *inputs: fused_loss(case, *inputs).total, leaves(case))


@given(
    seed=st.integers(0, 2**20),
    rows=st.integers(1, 12),
    vocab_size=st.integers(1, 40),
    padding=st.integers(0, 5),
    widths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    weights=st.tuples(st.floats(0.0, 3.0), st.floats(0.0, 3.0)),
    divergence=st.sampled_from(sorted(DIVERGENCES)),
    parameter=st.floats(0.05, 0.95),
    temperatures=st.tuples(st.floats(0.25, 4.0), st.none() | st.floats(0.25, 4.0)),
    squared=st.booleans(),
    scales=st.tuples(st.floats(0.5, 2.0), st.floats(0.5, 2.0)),
    softcaps=st.tuples(st.none() | st.floats(2.0, 20.0), st.none() | st.floats(2.0, 20.0)),
    large=st.integers(0, 9),
)
@settings(max_examples=120)
def test_any_shape_and_settings_equal_the_definition(
    seed, rows, vocab_size, padding, widths, weights, divergence, parameter, temperatures, squared, scales, softcaps,
    large,
):  # fmt: skip
    if large == 0:
        # Several chunks of 128 rows, the last one smaller.
        rows, vocab_size = 250 + rows, 600 + vocab_size
    case = make_case(
        seed,
        rows=rows,
        padded=vocab_size + padding,
        vocab_size=vocab_size,
        student_width=widths[0],
        teacher_width=widths[1],
        temperature=temperatures[0],
        teacher_temperature=temperatures[1],
        kd_weight=weights[0],
        ce_weight=weights[1],
        temperature_squared=squared,
        divergence=divergence,
        jsd_beta=parameter,
        skew_alpha=parameter,
        student_logit_scale=scales[0],
        teacher_logit_scale=scales[1],
        student_logit_softcap=softcaps[0],
        teacher_logit_softcap=softcaps[1],
    )
    hidden, head = leaves(case)
    total = fused_loss(case, hidden, head, chunk_mib=1).total
    total.backward()
    expected = solve(case)
    # Absolute, since a vocabulary of one id has loss and gradients of 0 up to rounding.
    torch.testing.assert_close(total.detach(), expected.total, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(hidden.grad, expected.hidden_grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(head.grad, expected.head_grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_incoming_gradient_scales_both(temperature):
    case = make_case(2, rows=20, padded=50, vocab_size=50, temperature=temperature)
    hidden, head = leaves(case)
    (fused_loss(case, hidden, head).total * -2.5).backward()
    expected = solve(case)
    assert relative(hidden.grad, -2.5 * expected.hidden_grad) <= 1e-10
    assert relative(head.grad, -2.5 * expected.head_grad) <= 1e-10


def test_backward_twice_gives_the_same():
    case = make_case(3, rows=20, padded=50, vocab_size=50)
    inputs = leaves(case)
    total = fused_loss(case, *inputs).total
    first = [g.clone() for g in torch.autograd.grad(total, inputs, retain_graph=True)]
    for one, other in zip(first, torch.autograd.grad(total, inputs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("wanted", ["hidden", "head"])
def test_one_input_alone(wanted):
    case = make_case(4, rows=20, padded=50, vocab_size=50)
    hidden, head = leaves(case)
    (head if wanted == "hidden" else hidden).requires_grad_(False)
    fused_loss(case, hidden, head).total.backward()
    expected = solve(case)
    if wanted == "hidden":
        assert head.grad is None and relative(hidden.grad, expected.hidden_grad) <= 1e-10
    else:
        assert hidden.grad is None and relative(head.grad, expected.head_grad) <= 1e-10


def test_without_gradients_main_grad_is_left_alone():
    case = make_case(5, rows=20, padded=50, vocab_size=50)
    hidden, head = leaves(case)
    main_grad = torch.zeros_like(head)
    with torch.no_grad():
        sums = fused_loss(case, hidden, head, main_grad=main_grad)
    frozen = fused_loss(case, hidden.detach(), head.detach(), main_grad=main_grad)
    assert not sums.total.requires_grad and not frozen.total.requires_grad
    assert main_grad.abs().max() == 0
    assert relative(sums.total, solve(case).total) <= 1e-10
    assert torch.equal(sums.total, frozen.total)


def test_only_total_carries_a_gradient():
    case = make_case(6, rows=20, padded=50, vocab_size=50)
    sums = fused_loss(case, *leaves(case))
    assert sums.total.requires_grad
    assert not sums.kd.requires_grad and not sums.ce.requires_grad


def main_grad_on_rank(cases: list[Case], sequence_parallel: bool, grad_scale: float) -> SimpleNamespace:
    """The cases as microbatches of one step; this rank's head gradient by main_grad and by autograd."""
    heads = [shard(cases[0].head).requires_grad_() for _ in range(2)]
    main_grad = torch.zeros_like(heads[0])
    hidden_grads = []
    for case in cases:
        for head, buffer in zip(heads, (main_grad, None), strict=True):
            hidden = shard(case.hidden, sequence_parallel).requires_grad_()
            sums = distillation_loss(
                hidden,
                head,
                case.labels,
                case.token_weights,
                sharded_signal(case, sequence_parallel),
                kd_weight=case.kd_weight,
                ce_weight=case.ce_weight,
                vocab_size=case.vocab_size,
                tp_group=dist.group.WORLD,
                sequence_parallel=sequence_parallel,
                chunk_mib=1,
                main_grad=buffer,
                grad_scale=grad_scale if buffer is not None else 1.0,
            )
            (sums.total * grad_scale).backward()
            hidden_grads.append(hidden.grad)
    return SimpleNamespace(
        main_grad=main_grad,
        plain=heads[1].grad,
        hidden_grads=hidden_grads,
        flags=[getattr(head, "grad_added_to_main_grad", False) for head in heads],
    )


@pytest.mark.parametrize(("tp_size", "sequence_parallel"), [(1, False), (2, True)])
@pytest.mark.parametrize("grad_scale", [1.0, 0.25, 1 / 3])
def test_main_grad_adds_up_over_microbatches(run_ranks, tp_size, sequence_parallel, grad_scale):
    cases = [make_case(7, dtype=torch.float32), make_case(8, rows=140, dtype=torch.float32)]
    # The head is one parameter: the second microbatch uses the first one's.
    cases[1].head.copy_(cases[0].head)
    ranks = run_ranks(tp_size, main_grad_on_rank, cases, sequence_parallel, grad_scale)
    for rank in ranks:
        assert rank.flags == [True, False]
        assert torch.equal(rank.hidden_grads[0], rank.hidden_grads[1])
    expected = grad_scale * sum(solve(case).head_grad for case in cases)
    assert relative(torch.cat([rank.main_grad for rank in ranks]), expected) <= 2e-6
    assert relative(torch.cat([rank.plain for rank in ranks]), expected) <= 2e-6


def test_a_tied_head_gets_zeros_beside_main_grad():
    case = make_case(9, rows=20, padded=50, vocab_size=50)
    hidden, head = leaves(case)
    head.zero_out_wgrad = True
    fused_loss(case, hidden, head, main_grad=torch.zeros_like(head)).total.backward()
    assert head.grad.abs().max() == 0 and head.grad_added_to_main_grad


def test_bfloat16_main_grad_stays_float32():
    case = make_case(10, rows=20, padded=50, vocab_size=50, dtype=torch.bfloat16)
    hidden, head = leaves(case)
    main_grad = torch.zeros(head.shape)
    fused_loss(case, hidden, head, main_grad=main_grad).total.backward()
    assert head.grad.dtype == torch.bfloat16
    assert relative(main_grad, solve(case).head_grad) <= 0.02


def test_a_gradient_other_than_grad_scale_is_refused():
    case = make_case(11, rows=20, padded=50, vocab_size=50)
    hidden, head = leaves(case)
    total = fused_loss(case, hidden, head, main_grad=torch.zeros_like(head), grad_scale=0.5).total
    with pytest.raises(ValueError, match=r"arrives at the loss is 1\.0.*grad_scale 0\.5"):
        total.backward()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_bfloat16(device, temperature):
    """Inputs are rounded before the reference too: what is left are products rounded to 8 bits, 2^-9 each.

    On CPU that hits the logits (up to 8, so off by up to 0.03) and dX; sums over tokens average it out.
    """
    case = make_case(12, dtype=torch.bfloat16, temperature=temperature)
    expected = solve(case)
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(case).items()}
    case = Case(**moved)
    hidden, head = leaves(case)
    sums = fused_loss(case, hidden, head, chunk_mib=1)
    sums.total.backward()
    assert sums.kd.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16
    assert relative(sums.kd.cpu(), expected.kd) <= 0.005
    assert relative(sums.ce.cpu(), expected.ce) <= 0.005
    assert relative(hidden.grad.cpu(), expected.hidden_grad) <= 0.02
    assert relative(head.grad.cpu(), expected.head_grad) <= 0.02


@pytest.mark.parametrize("count", [3, 6, 7, 10, 49])
def test_a_mean_over_tokens_is_a_grad_scale(count):
    """1/n is not a number of fp32, and dividing by n need not round as multiplying by 1/n does."""
    case = make_case(4, rows=count, padded=9, vocab_size=9, dtype=torch.float32)
    hidden, head = leaves(case)
    buffer = torch.zeros_like(head)
    (fused_loss(case, hidden, head, main_grad=buffer, grad_scale=1 / count).total / count).backward()
    assert relative(buffer, solve(case).head_grad / count) < 2e-6
