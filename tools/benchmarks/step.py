#!/usr/bin/env python
"""A distillation step against its parts done the ordinary way.

The yardstick is a forward pass of the teacher with its output head, followed by a cross-entropy step of the student
whose head is an ordinary product with autograd. Both sides use the same models, schedule and optimizer.

    OMP_NUM_THREADS=1 python tools/benchmarks/step.py
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import measure
import torch
import torch.nn.functional as F
from pair import Batch, build_pair, platform, random_batches

from megakd.config.architecture import GPTArchitecture
from megakd.config.schema import DistillSection
from megakd.losses import DenseSignal
from megakd.parallel.pipeline import run_pipeline
from megakd.teacher import OnlineTeacher
from megakd.training.build import Student
from megakd.training.objective import Objective
from megakd.training.step import train_step


def main() -> None:
    arguments = _arguments()
    dtype = torch.float32 if arguments.dtype == "fp32" else torch.bfloat16

    def architecture(hidden: int) -> GPTArchitecture:
        return GPTArchitecture(
            num_layers=arguments.layers, hidden_size=hidden, ffn_hidden_size=hidden * 8 // 3 // 64 * 64,
            vocab_size=arguments.vocab,
            num_attention_heads=hidden // 64, num_query_groups=hidden // 128, kv_channels=64,
            max_position_embeddings=arguments.sequence,
        )  # fmt: skip

    pair = build_pair(architecture(arguments.student_hidden), architecture(arguments.teacher_hidden), dtype)
    student, optimizer, teacher = pair.student, pair.optimizer, pair.teacher
    batches = random_batches(arguments.vocab, arguments.sequence, arguments.tokens // arguments.sequence)
    objective = Objective(DistillSection(), arguments.vocab, pair.mesh.groups.tp, sequence_parallel=False)

    def distil() -> None:
        train_step(student, teacher, objective, optimizer, batches, 1e-4, platform)

    def ordinary() -> None:
        with torch.no_grad():
            for signal in teacher.signals(batches):
                assert signal is not None
                signal.hidden @ signal.head.t()
        train_step(student, None, _OrdinaryHead(), optimizer, batches, 1e-4, platform)  # type: ignore[arg-type]

    seconds = measure.interleaved_seconds({"distil": distil, "ordinary": ordinary}, arguments.repeats)
    result = {
        "machine": measure.machine(),
        "distillation_step_s": statistics.median(seconds["distil"]),
        "ordinary_parts_s": statistics.median(seconds["ordinary"]),
        "ratio": measure.median_ratio(seconds["distil"], seconds["ordinary"]),
        **_loss_memory(student, teacher, objective, batches),
    }
    _report(result, arguments)


class _OrdinaryHead:
    """Cross-entropy on logits that autograd keeps: what a trainer without a fused head does."""

    def forward_step(self, pairs, model):  # type: ignore[no-untyped-def]
        batch, _ = next(pairs)

        def loss(hidden_and_head):  # type: ignore[no-untyped-def]
            hidden, head = hidden_and_head
            logits = (hidden @ head.t()).float()
            total = F.cross_entropy(logits.flatten(0, 1), batch["labels"].t().reshape(-1), reduction="sum")
            tokens = torch.tensor(batch["labels"].numel(), dtype=torch.int, device=total.device)
            zero = torch.zeros((), dtype=torch.float64, device=total.device)
            value = total.detach().double()
            return total, tokens, torch.stack([value, zero, value, tokens.double()])

        return model(batch["tokens"], batch["position_ids"], None), loss


def _plain_distillation(hidden, head, signal: DenseSignal, labels):  # type: ignore[no-untyped-def]
    """The same loss in plain torch: full logits of both models, autograd through the student's."""
    z, u = (hidden @ head.t()).float(), (signal.hidden @ signal.head.t()).float()
    log_q, log_p = z.log_softmax(-1), u.log_softmax(-1)
    kd = (log_p.exp() * (log_p - log_q)).sum()
    return kd + 0.0 * F.cross_entropy(z, labels, reduction="sum")


def _loss_memory(
    student: Student, teacher: OnlineTeacher, objective: Objective, batches: list[Batch]
) -> dict[str, float]:
    """Peak bytes of the loss part alone, gradients included, from the same hidden states."""
    signal = teacher.signals(batches[:1])[0]
    assert signal is not None
    captured: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward_step(pairs, model):  # type: ignore[no-untyped-def]
        batch = next(pairs)
        output = model(batch["tokens"], batch["position_ids"], None)
        return output, lambda hidden_and_head, non_loss_data: captured.append(hidden_and_head)

    shape = batches[0]["tokens"].shape
    with torch.no_grad():
        run_pipeline(student.mesh, student.model, forward_step, batches[:1], num_microbatches=1,
                     micro_batch_size=shape[0], sequence_length=shape[1], forward_only=True)  # fmt: skip
    hidden, head = captured[0]
    labels = batches[0]["labels"].t().reshape(-1)

    def fused() -> None:
        x = hidden.detach().requires_grad_()
        objective((x, head), batches[0], signal)[0].backward()

    def plain() -> None:
        x, w = hidden.detach().flatten(0, 1).requires_grad_(), head.detach().requires_grad_()
        _plain_distillation(x, w, signal, labels).backward()

    measured: dict[str, Callable[[], None]] = {"fused": fused, "plain": plain}
    peaks = {name: measure.peak_bytes(function) for name, function in measured.items()}
    return {
        "fused_loss_peak_mib": peaks["fused"] / 2**20,
        "plain_loss_peak_mib": peaks["plain"] / 2**20,
        "peak_ratio": peaks["fused"] / peaks["plain"],
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--student-hidden", type=int, default=512)
    parser.add_argument("--teacher-hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def _report(result: dict[str, object], arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps(result))
        return
    print(result["machine"])
    print(f"distillation step      {result['distillation_step_s']:.2f} s")
    print(f"ordinary parts         {result['ordinary_parts_s']:.2f} s")
    print(f"ratio, median of {arguments.repeats} interleaved: {result['ratio']:.3f}")
    print(
        f"loss part, peak MiB: fused {result['fused_loss_peak_mib']:.0f}, plain torch "
        f"{result['plain_loss_peak_mib']:.0f}, ratio {result['peak_ratio']:.3f}"
    )


if __name__ == "__main__":
    main()
