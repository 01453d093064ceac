#!/usr/bin/env python
"""The fused distillation loss against other ways to compute it and against its four bare matrix products.

Each way runs in a fresh process; the processes take turns, one call each per round. Ratios are medians over rounds;
seconds are the process's own on one CPU thread, and the clock's otherwise. TFLOP/s counts the four products.

    python tools/benchmarks/loss.py --divergence forward_kl --json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loss_forms
import measure
import torch
from torch import Tensor

from megakd.losses import DenseSignal, distillation_loss
from megakd.losses.divergences import DIVERGENCES

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
BARE = ("bare products, chunked", "bare products, whole")
OURS = "megakd"


def main() -> None:
    arguments = _arguments()
    if arguments.worker:
        _serve(arguments)
        return
    ways = [*BARE, OURS, *loss_forms.FORMS]
    if arguments.divergence != "forward_kl":
        ways = [way for way in ways if way not in loss_forms.FORWARD_KL_ALONE]
    if arguments.only:
        ways = [way for way in ways if way in (*BARE, OURS) or any(word in way for word in arguments.only)]
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.pt"
        if not arguments.no_reference:
            torch.save(_reference(arguments), reference)
        results = _take_turns(ways, reference, arguments)
    fastest = min((results[way]["seconds"] for way in BARE), key=statistics.median)
    n, v = arguments.tokens, arguments.vocab
    products = 2 * n * v * (3 * arguments.student_hidden + arguments.teacher_hidden)
    for result in results.values():
        result["ratio_to_products"] = measure.median_ratio(result["seconds"], fastest)
        result["median_s"] = statistics.median(result.pop("seconds"))
        result["tflops"] = products / result["median_s"] / 1e12
    _report({"machine": measure.machine(), "settings": vars(arguments), "results": results}, arguments.json)


def _take_turns(ways: list[str], reference: Path, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Start a process per way, run them in turn after a warm-up round, then ask each for its peak and error."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    command = [sys.executable, __file__, *sys.argv[1:]]
    workers = {
        way: subprocess.Popen([*command, "--worker", way, "--reference", str(reference)], env=environment, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for way in ways
    }  # fmt: skip
    try:
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for round_ in range(arguments.repeats + 1):
            for way, worker in workers.items():
                taken = _ask(way, worker, "run")
                if round_:
                    seconds[way].append(taken)
        return {way: {"seconds": seconds[way], **_ask(way, worker, "finish")} for way, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()


def _ask(way: str, worker: subprocess.Popen[str], question: str) -> Any:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(question + "\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        raise SystemExit(f"{way} ended with status {worker.wait()}")
    return json.loads(answer)


def _serve(arguments: argparse.Namespace) -> None:
    """A worker's life: one call per line `run`, figures at `finish`."""
    torch.set_num_threads(arguments.threads)
    inputs = _inputs(arguments)
    x, head = inputs[:2]
    # What other programs take of a core does not count where there is one thread.
    clock = time.process_time if arguments.device == "cpu" and arguments.threads == 1 else time.perf_counter
    function = _bare(arguments, inputs) if arguments.worker in BARE else _loss(arguments, inputs)
    for line in sys.stdin:
        if line.strip() == "run":
            _synchronize(arguments.device)
            started = clock()
            function()
            _synchronize(arguments.device)
            print(json.dumps(clock() - started), flush=True)
            x.grad = None
            continue
        figures: dict[str, float] = {}
        if arguments.worker not in BARE:
            head.main_grad.zero_()  # type: ignore[attr-defined]
            kept = x.nbytes + (0 if arguments.worker == OURS else head.nbytes)  # gradients that the call allocates
            figures["peak_mib_above_gradients"] = (measure.peak_bytes(function) - kept) / 2**20
            if not arguments.no_reference:
                expected = torch.load(arguments.reference, map_location=arguments.device)
                found = (x.grad, head.main_grad if arguments.worker == OURS else head.grad)  # type: ignore[attr-defined]
                for name, gradient, exact in zip(("hidden", "head"), found, expected, strict=True):
                    assert gradient is not None
                    figures[f"{name}_gradient_error"] = float((gradient.double() - exact).norm() / exact.norm())
        print(json.dumps(figures), flush=True)


def _loss(arguments: argparse.Namespace, inputs: Inputs) -> Callable[[], None]:
    """Forward and backward of the worker's way; ours adds to main_grad, the others hand the head's gradient out."""
    x, head, teacher_x, teacher_head, labels = inputs
    weights = torch.ones(len(labels), device=labels.device)

    def run() -> None:
        x.grad = head.grad = None
        if arguments.worker != OURS:
            loss_forms.FORMS[arguments.worker](*inputs, arguments.divergence).backward()
            return
        distillation_loss(
            x, head, labels, weights, DenseSignal(teacher_x, teacher_head), kd_weight=loss_forms.KD_WEIGHT,
            ce_weight=loss_forms.CE_WEIGHT, vocab_size=len(head), divergence=arguments.divergence,
            jsd_beta=loss_forms.JSD_BETA, skew_alpha=loss_forms.SKEW_ALPHA, chunk_mib=arguments.chunk_mib,
            main_grad=head.main_grad,  # type: ignore[attr-defined]
        ).total.backward()  # fmt: skip

    return run


def _bare(arguments: argparse.Namespace, inputs: Inputs) -> Callable[[], None]:
    """Both projections and both gradient products, into memory that is there, with 256 rows at a time (GPU: 1024)."""
    x, head, teacher_x, teacher_head, _ = (tensor.detach() for tensor in inputs)
    rows = len(x) if arguments.worker == BARE[1] else min(len(x), 1024 if arguments.device == "cuda" else 256)
    z, u = (torch.empty((rows, len(head)), dtype=x.dtype, device=x.device) for _ in range(2))
    x_gradient, head_gradient = torch.empty_like(x), torch.zeros_like(head)

    def run() -> None:
        for start in range(0, len(x), rows):
            part = slice(start, min(start + rows, len(x)))
            count = part.stop - start
            torch.mm(x[part], head.t(), out=z[:count])
            torch.mm(teacher_x[part], teacher_head.t(), out=u[:count])
            torch.mm(z[:count], head, out=x_gradient[part])
            head_gradient.addmm_(z[:count].t(), x[part])

    return run


def _inputs(arguments: argparse.Namespace) -> Inputs:
    """Hidden states and heads whose logits have a standard deviation of 2, rounded to the dtype."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32

    def normal(rows: int, width: int, std: float) -> Tensor:
        return (torch.randn(rows, width, generator=generator) * std).to(arguments.device, dtype)

    n, v, h, h_t = arguments.tokens, arguments.vocab, arguments.student_hidden, arguments.teacher_hidden
    x, head = normal(n, h, 1.0).requires_grad_(), normal(v, h, 2 * h**-0.5).requires_grad_()
    head.main_grad = torch.zeros((v, h), device=arguments.device)  # type: ignore[attr-defined]
    teacher = normal(n, h_t, 1.0), normal(v, h_t, 2 * h_t**-0.5)
    labels = torch.randint(0, v, (n,), generator=generator).to(arguments.device)
    return x, head, *teacher, labels


def _reference(arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Both gradients from the definition in fp64, 128 tokens at a time."""
    x, head, teacher_x, teacher_head, labels = (t.detach() for t in _inputs(arguments))
    head, teacher_head = head.double().requires_grad_(), teacher_head.double()
    gradients = []
    for part in torch.arange(len(x), device=x.device).split(128):
        rows = x[part].double().requires_grad_()
        teacher_rows = teacher_x[part].double()
        loss_forms.plain(rows, head, teacher_rows, teacher_head, labels[part], arguments.divergence).backward()
        assert rows.grad is not None
        gradients.append(rows.grad)
    assert head.grad is not None
    return torch.cat(gradients).cpu(), head.grad.cpu()


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _report(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    print(result["machine"])
    print(", ".join(f"{key} {value}" for key, value in result["settings"].items() if value not in (None, False, "")))
    print(f"{'':26}{'seconds':>9}{'of bare':>9}{'TFLOP/s':>9}{'peak MiB':>10}{'dX error':>10}{'dW error':>10}")
    for way, figures in result["results"].items():
        line = f"{way:26}{figures['median_s']:9.3f}{figures['ratio_to_products']:9.3f}{figures['tflops']:9.3f}"
        if "peak_mib_above_gradients" in figures:
            line += f"{figures['peak_mib_above_gradients']:10.1f}"
        for name in ("hidden", "head"):
            if f"{name}_gradient_error" in figures:
                line += f"{figures[f'{name}_gradient_error']:10.1e}"
        print(line)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--student-hidden", type=int, default=512)
    parser.add_argument("--teacher-hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--divergence", choices=sorted(DIVERGENCES), default="forward_kl")
    parser.add_argument("--chunk-mib", type=int, help="the loss's default where not given")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="*", help="words of the other ways' names to run; none where nothing matches")
    parser.add_argument("--no-reference", action="store_true", help="skip the fp64 gradient")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--reference", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
