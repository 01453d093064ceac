"""Students of the quickstart trained with each objective, and what each is like on held-out text.

After `./launch.sh quickstart`, whose text it uses: `python tools/benchmarks/objectives.py`. Figures are from
transformers and the definitions, on the students that the runs export.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import measure
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megakd.data.indexed import TokenStream

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "quickstart" / "distill.yaml"
SEQUENCE = 256

OBJECTIVES: dict[str, list[str]] = {
    "forward_kl": [],
    "reverse_kl": ["distill.loss=reverse_kl"],
    "jsd": ["distill.loss=jsd"],
    "skew_forward_kl": ["distill.loss=skew_forward_kl"],
    "skew_reverse_kl": ["distill.loss=skew_reverse_kl"],
    "tvd": ["distill.loss=tvd"],
    "cross-entropy": ["distill.kd_weight=0", "distill.ce_weight=1"],
    "forward_kl and cross-entropy, half each": ["distill.kd_weight=0.5", "distill.ce_weight=0.5"],
    "forward_kl at temperature 2": ["distill.temperature=2"],
}


def main() -> None:
    """Train and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--data", default="runs/quickstart/data", help="the quickstart's text")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--tokens", type=int, default=32768, help="held-out tokens that are measured")
    parser.add_argument("--only", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    options = parser.parse_args()
    print(f"{measure.machine()}; {options.steps} steps, seed {options.seed}")
    teacher = AutoModelForCausalLM.from_pretrained(CONFIG.parent / "teacher", dtype=torch.float32)
    columns = ("CE", "forward KL", "reverse KL", "TVD", "agreement", "entropy")
    print(f"{'':42}" + "".join(f"{name:>12}" for name in columns))
    for name in options.only:
        folder = options.output_dir / f"{name.replace(' ', '-').replace(',', '')}-{options.seed}"
        _train(folder, OBJECTIVES[name], options)
        student = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
        figures = _score(student, teacher, Path(options.data) / "held_out", options.tokens)
        print(f"{name:42}" + "".join(f"{figure:12.4f}" for figure in figures), flush=True)


def _train(folder: Path, overrides: list[str], options: argparse.Namespace) -> None:
    settings = {
        "run.output_dir": str(folder),
        "run.seed": options.seed,
        "data.train": f"{options.data}/train",
        "schedule.train_steps": options.steps,
        "parallel": {},
        "evaluation": {},
        "checkpoint.save_at_end": False,
        "checkpoint.resume": False,
    }
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    command = [sys.executable, "-m", "megakd", "train", str(CONFIG), *words, *overrides, "--nproc-per-node", "1"]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


@torch.no_grad()
def _score(student: torch.nn.Module, teacher: torch.nn.Module, prefix: Path, tokens: int) -> list[float]:
    """Means over held-out tokens: CE, KL(p, q), KL(q, p), TVD, agreement on the first id, the student's entropy."""
    stream = TokenStream(prefix).slice(0, tokens + 1)
    sums, count = torch.zeros(6, dtype=torch.float64), 0
    for start in range(0, tokens, SEQUENCE * 8):
        ids = torch.as_tensor(stream[start : start + SEQUENCE * 8 + 1])
        inputs, labels = ids[:-1].view(-1, SEQUENCE), ids[1:].view(-1, SEQUENCE)
        log_q, log_p = (model(inputs).logits.double().log_softmax(-1) for model in (student, teacher))
        sums += _figures(log_p, log_q, labels)
        count += labels.numel()
    return (sums / count).tolist()


def _figures(log_p: Tensor, log_q: Tensor, labels: Tensor) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    return torch.stack([
        -log_q.gather(-1, labels.unsqueeze(-1)).sum(), (p * (log_p - log_q)).sum(), (q * (log_q - log_p)).sum(),
        (p - q).abs().sum() / 2, (p.argmax(-1) == q.argmax(-1)).sum().double(), -(q * log_q).sum(),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
