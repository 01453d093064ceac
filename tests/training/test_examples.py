"""Training on examples: packed or one by one, under every layout, the gradient is the one transformers gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from megakd.training.loop import distill
from tests.data.example_files import write_examples, write_pair
from tests.training.layout_run import gather_gradients
from tests.training.runs import SEQUENCE, VOCAB, build, layout, run_values, write_run_files

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one_by_one": (1, layout(data__micro_batch_size=1)),
    "packed": (1, layout(data__packing=True, data__micro_batch_size=1)),
    "packed_pairs": (1, layout(data__packing=True, data__micro_batch_size=2)),
    "packed_tp2_pp2": (4, layout(2, 2, data__packing=True, data__micro_batch_size=2)),
    "packed_tp2_sequence_parallel": (
        2, layout(2, data__packing=True, parallel__sequence_parallel=True, data__micro_batch_size=1),
    ),
    "packed_recomputed_dp2": (
        2, layout(data__packing=True, data__micro_batch_size=1, student__recompute_granularity="full"),
    ),
}  # fmt: skip


def chat_examples() -> list[tuple[list[int], list[int]]]:
    """Examples of 2 to 17 tokens, their prompts of any length from 1."""
    draw = np.random.default_rng(5)
    examples = []
    for size in [*draw.integers(2, SEQUENCE + 2, size=20), SEQUENCE + 1, 2]:
        prompt = int(draw.integers(1, size))
        mask = [0] * prompt + [int(draw.integers(3)) for _ in range(size - prompt - 1)] + [2]
        examples.append((draw.integers(VOCAB, size=size).tolist(), mask))
    return examples


def chat_weights(name: str) -> list[list[float]]:
    """Weights of the examples' tokens: ones for "chat", else such as differ within examples and between them."""
    draw = np.random.default_rng(6)
    weights = [draw.uniform(0.1, 1.0, len(ids)) * (1 + number) for number, (ids, _) in enumerate(chat_examples())]
    return [(np.ones_like(one) if name == "chat" else one.astype(np.float32)).tolist() for one in weights]


def write_weighted_examples(prefix: Path) -> None:
    """The examples with weights."""
    write_examples(prefix, chat_examples())
    write_pair(f"{prefix}.weight", chat_weights("weighted"), np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run_files(tmp_path_factory.mktemp("files"))
    write_examples(folder / "chat", chat_examples())
    write_weighted_examples(folder / "weighted")
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
    """Sums and gradient over all examples, each alone in transformers, by data set."""
    return {name: alone_in_transformers(folder, name) for name in ("chat", "weighted")}


def alone_in_transformers(folder: Path, name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    student = LlamaForCausalLM.from_pretrained(folder / "student", dtype=torch.float64)
    teacher = LlamaForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float64).eval()
    kd, ce, total, count = *(torch.zeros((), dtype=torch.float64) for _ in range(3)), 0
    for (ids, mask), each in zip(chat_examples(), chat_weights(name), strict=True):
        tokens = torch.tensor([ids])
        counts = torch.tensor(mask[1:]) > 0
        weights = torch.tensor(each[1:], dtype=torch.float64) * counts
        log_q = student(tokens).logits[0, :-1].log_softmax(-1)
        with torch.no_grad():
            log_p = teacher(tokens).logits[0, :-1].log_softmax(-1)
        kd = kd + weights @ (log_p.exp() * (log_p - log_q)).sum(-1)
        ce = ce - weights @ log_q.gather(-1, tokens[0, 1:, None]).squeeze(-1)
        total, count = total + weights.sum(), count + int(counts.sum())
    ((0.5 * kd + ce) / total).backward()
    sums = [(0.5 * kd + ce).item(), kd.item(), ce.item(), float(count), total.item()]
    gradient = {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert len(gradient) == len(dict(student.named_parameters()))
    return sums, gradient


def sums_and_gradient(values: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    from megakd.data.batches import collate
    from megakd.training.train_data import open_train_data

    run = build(values)
    samples, size = open_train_data(run.config).samples, run.config.data.micro_batch_size
    if size > 1:
        assert samples.num_samples % size == 0, samples.num_samples
    starts = range(0, samples.num_samples, size)
    parts = [collate(samples, list(range(start, start + size))) for start in starts]
    return run.accumulate(parts[run.mesh.dp_rank :: run.mesh.dp_size]), gather_gradients(run.student)


@pytest.mark.parametrize("data", ["chat", "weighted"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_gradient_is_that_of_the_examples(
    folder: Path,
    expected: dict[str, tuple[list[float], dict[str, torch.Tensor]]],
    name: str,
    data: str,
    run_ranks: Callable[..., list[Any]],
) -> None:
    world_size, settings = LAYOUTS[name]
    values = run_values(folder, data__train=str(folder / data), **settings)
    for sums, gradient in run_ranks(world_size, sums_and_gradient, values):
        assert sums == pytest.approx(expected[data][0], rel=1e-6)
        for key, wanted in expected[data][1].items():
            assert (gradient[key] - wanted).norm() < 1e-5 * wanted.norm(), key


def train_on_a_blend(values: dict[str, Any]) -> Any:
    from megakd.config.load import config_from_dict

    return distill(config_from_dict(values)).scores


def test_a_blend_of_text_and_examples_trains_and_is_measured(
    folder: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    """One order under both layouts, so the same student; text attends as ever beside packed examples."""
    settings: dict[str, Any] = {
        "data__train": [{"path": str(folder / "data"), "weight": 1}, {"path": str(folder / "chat"), "weight": 3}],
        "data__packing": True, "data__test_fraction": 0.2, "data__valid": [str(folder / "chat"), str(folder / "data")],
        "data__reset_attention_mask": True, "data__eod_mask_loss": True,
        "evaluation__at_end": True, "schedule__train_steps": 6, "run__export": False,
    }  # fmt: skip
    scores = []
    for name, (world_size, places) in {"one": (1, layout()), "four": (4, layout(2, 2))}.items():
        values = run_values(folder, run__output_dir=str(tmp_path / name), **settings, **places)
        scores.append(run_ranks(world_size, train_on_a_blend, values)[0][6])
    # Cut short after two steps, then on two data ranks: the order goes on where it was.
    cut = {"checkpoint__save_at_end": True, "schedule__train_steps": 2, "run__output_dir": str(tmp_path / "cut")}
    run_ranks(1, train_on_a_blend, run_values(folder, **(settings | cut)))
    whole = {"run__output_dir": str(tmp_path / "cut")}
    resumed = run_ranks(2, train_on_a_blend, run_values(folder, **(settings | whole)))[0][6]
    assert resumed.cross_entropy == pytest.approx(scores[0].cross_entropy, rel=1e-5)
    assert scores[0].num_tokens == scores[1].num_tokens
    assert scores[0].cross_entropy == pytest.approx(scores[1].cross_entropy, rel=1e-5)
    assert scores[0].kl_to_teacher == pytest.approx(scores[1].kl_to_teacher, rel=1e-4)
