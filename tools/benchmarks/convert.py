#!/usr/bin/env python
"""Importing and exporting a random model of Qwen2.5-1.5B's shape against copying its files: time and memory.

Every round copies (`cp -r` and `sync`), imports and exports, each in a process of its own, sources in the page cache.
A conversion takes from the start of Python to its exit. Between its imports and its work, and just before `cp`,
as much memory is used and freed as a copy fills: what the host of a virtual machine has taken back takes several times
as long to fill, and it takes back what is free for two seconds.

    python tools/benchmarks/convert.py --rounds 3 --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import measure
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
QWEN = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 1536,
    "intermediate_size": 8960, "max_position_embeddings": 131072, "num_attention_heads": 12, "num_key_value_heads": 2,
    "num_hidden_layers": 28, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def main() -> None:
    arguments = _arguments()
    if arguments.worker:
        _serve(arguments.worker)
        return
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        source, copy, megatron, back = (Path(folder) / name for name in ("hf", "copy", "megatron", "back"))
        _write_model(source, arguments.layers)
        seconds: dict[str, list[float]] = {"copy": [], "import": [], "export": []}
        memory: dict[str, int] = {}
        for round_ in range(arguments.rounds + 1):
            _prepare(source, copy)
            started = time.perf_counter()
            subprocess.run(["sh", "-c", f"cp -r {source} {copy} && sync"], check=True)
            taken = {"copy": time.perf_counter() - started}
            for command, options in (
                ("import", ["--hf", str(source), "--out", str(megatron)]),
                ("export", ["--megatron", str(megatron), "--out", str(back)]),
            ):
                taken[command], peak = _convert(command, options, source)
                memory[command] = max(memory.get(command, 0), peak)
            if round_:
                for what, value in taken.items():
                    seconds[what].append(value)
        size = sum(file.stat().st_size for file in source.iterdir())
    result = {
        "machine": measure.machine(),
        "bytes": size,
        "copy_seconds": statistics.median(seconds["copy"]),
        **{f"{what}_to_copy": measure.median_ratio(seconds[what], seconds["copy"]) for what in memory},
        **{f"{what}_peak_mib": peak / 2**20 for what, peak in memory.items()},
        "seconds": seconds,
    }
    print(json.dumps(result) if arguments.json else "\n".join(f"{key}: {value}" for key, value in result.items()))


def _prepare(source: Path, out: Path) -> None:
    """Remove what stands there, and leave twice the memory needed for the page cache, used a moment ago."""
    copies = f"cp -r {source} {out}; cp -r {source} {out}.too; rm -rf {out} {out}.too; sync"
    subprocess.run(["sh", "-c", f"rm -rf {out}; {copies}"], check=True)


def _convert(command: str, options: list[str], source: Path) -> tuple[float, int]:
    """Seconds and bytes of memory of one conversion."""
    started = time.perf_counter()
    worker = [sys.executable, __file__, "--worker", command, *options]
    with subprocess.Popen(worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "imported\n"
        imports = time.perf_counter() - started
        _prepare(source, Path(options[-1]))
        started = time.perf_counter()
        answer, _ = process.communicate("go\n")
    if process.returncode:
        sys.exit(process.returncode)
    return imports + time.perf_counter() - started, json.loads(answer.splitlines()[-1])


def _serve(command: list[str]) -> None:
    """Run a conversion and print the most anonymous memory it had resident, above what was there after all imports."""
    sys.path.insert(0, str(ROOT / "tools"))
    import convert_checkpoint
    import rich.progress  # noqa: F401

    import megakd.convert.exporting
    import megakd.convert.importing  # noqa: F401

    print("imported", flush=True)
    sys.stdin.readline()
    before = peak = _anonymous_bytes()
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.005):
            peak = max(peak, _anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = convert_checkpoint.main(command)
    ended.set()
    watcher.join()
    print(peak - before)
    sys.exit(status)


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


def _write_model(folder: Path, layers: int) -> None:
    """Two files of random weights in transformers' names."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN | {"num_hidden_layers": layers}))
    h, f, kv = QWEN["hidden_size"], QWEN["intermediate_size"], 256
    shapes: dict[str, Any] = {"model.embed_tokens.weight": (QWEN["vocab_size"], h), "model.norm.weight": (h,)}
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {
            p + "input_layernorm.weight": (h,), p + "post_attention_layernorm.weight": (h,),
            p + "self_attn.q_proj.weight": (h, h), p + "self_attn.q_proj.bias": (h,),
            p + "self_attn.k_proj.weight": (kv, h), p + "self_attn.k_proj.bias": (kv,),
            p + "self_attn.v_proj.weight": (kv, h), p + "self_attn.v_proj.bias": (kv,),
            p + "self_attn.o_proj.weight": (h, h), p + "mlp.gate_proj.weight": (f, h),
            p + "mlp.up_proj.weight": (f, h), p + "mlp.down_proj.weight": (h, f),
        }  # fmt: skip
    names = list(shapes)
    weight_map: dict[str, str] = {}
    for index, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        file = f"model-{index + 1:05d}-of-00002.safetensors"
        save_file({name: torch.randn(shapes[name]).bfloat16() for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=28, help="28 is Qwen2.5-1.5B")
    parser.add_argument("--dir", help="where to put the files (default: the system's temporary folder)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
