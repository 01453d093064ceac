#!/usr/bin/env python
"""Model FLOPs utilisation of whole distillation steps on one rank, and where their time goes.

Random weights in published shapes; the figures do not depend on what the weights are.

    python tools/benchmarks/utilisation.py --peak-tflops 989      # an H100's or H200's bf16, from its data sheet
    OMP_NUM_THREADS=1 python tools/benchmarks/utilisation.py --shapes tiny --sequence 128 --dtype fp32
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from typing import Any

import measure
import torch
from pair import build_pair, platform, random_batches

from megakd.config.architecture import GPTArchitecture
from megakd.config.schema import DistillSection
from megakd.job.flops import step_flops
from megakd.training.objective import Objective
from megakd.training.step import train_step


def _llama(layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab: int) -> GPTArchitecture:
    return GPTArchitecture(
        num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=heads, num_query_groups=groups,
        kv_channels=hidden // heads, vocab_size=vocab, max_position_embeddings=131072, rotary_base=500000.0,
    )  # fmt: skip


# (student, teacher): Llama 3.2 1B and Llama 3.1 8B as their config.json describe them, heads untied.
SHAPES = {
    "8b-1b": (_llama(16, 2048, 8192, 32, 8, 128256), _llama(32, 4096, 14336, 32, 8, 128256)),
    "tiny": (_llama(2, 128, 256, 4, 2, 8192), _llama(4, 256, 512, 4, 2, 8192)),
}
# What a kernel's name says it does, first match; the rest is "other".
KINDS = {
    "attention": ("flash", "fmha", "attention", "softmax_warp"),
    "matrix products": ("gemm", "cutlass", "nvjet", "xmma", "::mm", "addmm", "::bmm"),
    "loss kernels": ("statistics", "gradient_kernel", "mixture"),
    "optimizer": ("adam", "multi_tensor", "l2norm", "foreach"),
    "copies": ("memcpy", "memset", "copy_", "fill_"),
    "elementwise and norms": ("elementwise", "reduce", "norm", "vectorized", "::mul", "::add", "::exp", "silu"),
}


def main() -> None:
    arguments = _arguments()
    small, large = SHAPES[arguments.shapes]
    dtype = torch.float32 if arguments.dtype == "fp32" else torch.bfloat16
    pair = build_pair(small, large, dtype, recompute=arguments.recompute)
    objective = Objective(
        DistillSection(loss_chunk_mib=arguments.chunk_mib),
        small.vocab_size,
        pair.mesh.groups.tp,
        sequence_parallel=False,
    )
    batches = random_batches(small.vocab_size, arguments.sequence, arguments.micro_batch, arguments.microbatches)

    def step() -> None:
        train_step(pair.student, pair.teacher, objective, pair.optimizer, batches, 1e-4, platform)

    step()
    seconds = []
    for _ in range(arguments.repeats):
        platform.synchronize()
        started = time.perf_counter()
        step()
        platform.synchronize()
        seconds.append(time.perf_counter() - started)
    tokens = arguments.micro_batch * arguments.microbatches * arguments.sequence
    median = statistics.median(seconds)
    tflops = step_flops(small, large, arguments.sequence, tokens) / median / 1e12
    result: dict[str, Any] = {
        "machine": measure.machine(),
        "settings": vars(arguments),
        "median_s": median,
        "tokens_per_second": tokens / median,
        "model_tflops": tflops,
        "utilisation": None if arguments.peak_tflops is None else tflops / arguments.peak_tflops,
        "share_of_time": _shares(step),
    }
    if torch.cuda.is_available():
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps(result, indent=None if arguments.json else 2))


def _shares(step: Any) -> dict[str, float]:
    """Share of the device's busy time by kind of kernel, and of the step in which it was idle (GPU only)."""
    on_gpu = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    started = time.perf_counter()
    with torch.profiler.profile(activities=[activity]) as profile:
        step()
        platform.synchronize()
    elapsed = time.perf_counter() - started
    times: Counter[str] = Counter()
    for event in profile.key_averages():
        kind = next((kind for kind, words in KINDS.items() if any(w in event.key.lower() for w in words)), "other")
        times[kind] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    busy = sum(times.values())
    shares = {kind: value / busy for kind, value in times.most_common()}
    if on_gpu:
        shares["idle, of the step"] = max(0.0, 1.0 - busy / 1e6 / elapsed)
    return shares


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=sorted(SHAPES), default="8b-1b")
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--chunk-mib", type=int, help="the loss's default where not given")
    parser.add_argument("--peak-tflops", type=float, help="the device's peak, for the utilisation")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one line")
    return parser.parse_args()


if __name__ == "__main__":
    main()
