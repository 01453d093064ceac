"""Training from a cache is training from the teacher, under every layout of either."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megakd.cache.manifest import Manifest
from megakd.cache.reader import CacheReader
from megakd.common.errors import UserError
from megakd.config.load import config_from_dict, load_config
from megakd.training.loop import distill
from megakd.training.preflight import preflight, preflight_cache
from megakd.training.teacher_cache import cache_codec
from tests.data.example_files import write_examples
from tests.training.layout_run import gather_gradients
from tests.training.runs import (
    SEQUENCE,
    VOCAB,
    build,
    layout,
    learnable_tokens,
    run_values,
    write_run_files,
    write_tokens,
)
from tests.training.test_examples import chat_examples, write_weighted_examples

EVERY_ID = {"cache__mode": "topk", "cache__k": VOCAB, "cache__log_probability_bits": 32}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, layout()),
    "tp2_sp": (2, layout(2, parallel__sequence_parallel=True)),
    "tp2_pp2": (4, layout(2, 2)),
    "dp2": (2, layout(data__micro_batch_size=4)),
}
DATA: dict[str, dict[str, Any]] = {
    "text": {},
    "text_apart": {"data__reset_attention_mask": True, "data__reset_position_ids": True, "data__eod_mask_loss": True},
    "packed": {"data__train": "chat", "data__packing": True},
    "padded": {"data__train": "chat", "data__truncation": "keep_start"},
    "blend": {"data__train": ["chat", "data"], "data__packing": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run_files(tmp_path_factory.mktemp("files"), samples=40)
    write_examples(folder / "chat", chat_examples())
    write_weighted_examples(folder / "weighted")
    return folder


def values(folder: Path, **settings: Any) -> dict[str, Any]:
    """A configuration whose data sets are named within the folder; the divergence alone unless said."""
    settings = {"distill__ce_weight": 0.0, "distill__kd_weight": 1.0, **settings}
    train = settings.pop("data__train", "data")
    names = [train] if isinstance(train, str) else train
    return run_values(folder, data__train=[str(folder / name) for name in names], **settings)


def from_cache(folder: Path, path: Path, **settings: Any) -> dict[str, Any]:
    found = values(folder, **settings)
    found["teacher"] = {"source": "cache", "path": str(path)}
    found.pop("cache", None)
    return found


def cache_on_rank(settings: dict[str, Any], overwrite: bool = False) -> Manifest | None:
    from megakd.training.caching import write_cache

    return write_cache(config_from_dict(settings), overwrite=overwrite)


def write(run_ranks: Callable[..., list[Any]], world: int, settings: dict[str, Any], path: Path) -> Manifest:
    manifest = run_ranks(world, cache_on_rank, settings | {"cache": settings.get("cache", {}) | {"path": str(path)}})[0]
    assert isinstance(manifest, Manifest)
    return manifest


def first_step(settings: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Sums and whole gradient of the first global batch."""
    run = build(settings)
    batches = run.batches()
    try:
        sums = run.accumulate(batches.microbatches(0))
    finally:
        batches.close()
    return sums, gather_gradients(run.student)


def losses_on_rank(settings: dict[str, Any]) -> None:
    distill(config_from_dict(settings))


def losses(run_ranks: Callable[..., list[Any]], world: int, settings: dict[str, Any], folder: Path) -> list[float]:
    settings = settings | {"run": settings["run"] | {"output_dir": str(folder), "export": False}}
    run_ranks(world, losses_on_rank, settings)
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(actual: tuple[list[float], Any], expected: tuple[list[float], Any], tolerance: float) -> None:
    assert actual[0] == pytest.approx(expected[0], rel=tolerance, abs=tolerance)
    assert set(actual[1]) == set(expected[1])
    for name, gradient in expected[1].items():
        assert (actual[1][name] - gradient).norm() <= tolerance * gradient.norm() + 1e-9, name


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(
    ("writer", "reader"), [("one", "tp2_pp2"), ("tp2_sp", "dp2"), ("tp2_pp2", "one"), ("dp2", "tp2_sp")]
)
def test_with_every_id_the_gradient_is_the_teacher_s(
    run_ranks: Callable[..., list[Any]], folder: Path, tmp_path: Path, data: str, writer: str, reader: str
) -> None:
    world, where = LAYOUTS[writer]
    manifest = write(run_ranks, world, values(folder, **DATA[data], **EVERY_ID, **where), tmp_path / "cache")
    world, where = LAYOUTS[reader]
    mixed = {"distill__ce_weight": 0.5}
    actual = run_ranks(world, first_step, from_cache(folder, tmp_path / "cache", **DATA[data], **where, **mixed))[0]
    expected = run_ranks(1, first_step, values(folder, **DATA[data], **mixed))[0]
    assert manifest.rows > 0
    assert_same(actual, expected, 1e-5)


def test_a_cache_serves_whatever_its_tokens_weigh(
    run_ranks: Callable[..., list[Any]], folder: Path, tmp_path: Path
) -> None:
    """Written from data without weights, read with the same data with weights."""
    write(run_ranks, 1, values(folder, data__train="chat", data__packing=True, **EVERY_ID), tmp_path / "cache")
    world, where = LAYOUTS["tp2_pp2"]
    settings = {"data__train": "weighted", "data__packing": True, "distill__ce_weight": 0.5}
    found = from_cache(folder, tmp_path / "cache", **settings, **where)
    preflight(config_from_dict(found), world)
    expected = run_ranks(1, first_step, values(folder, **settings))[0]
    assert expected[0][4] != expected[0][3]
    assert_same(run_ranks(world, first_step, found)[0], expected, 1e-5)


def test_a_cache_made_under_another_mask_is_written_again(
    run_ranks: Callable[..., list[Any]], folder: Path, tmp_path: Path
) -> None:
    examples = chat_examples()
    prefix = write_examples(tmp_path / "d", examples)
    settings = {"data__train": prefix, "data__packing": True}
    write(run_ranks, 1, values(folder, **settings), tmp_path / "cache")
    _, mask = next(example for example in examples if 1 in example[1])
    mask[mask.index(1)] = 3
    write_examples(prefix, examples)
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(from_cache(folder, tmp_path / "cache", **settings)))
    with pytest.raises(UserError) as refused:
        preflight(load_config(config, []), 1)
    message = str(refused.value)
    assert message.startswith(
        f"data.train: {prefix} has the tokens that {tmp_path / 'cache'} was written from and another mask of which of "
        "them count: the data was written again with other mask rules or flags"
    )
    command = message.partition("./launch.sh cache CONFIG ")[2].split()
    assert command[-1] == "--overwrite" and len(command) == 4
    again = load_config(config, command[:-1])
    preflight_cache(again, 1)
    run_ranks(1, cache_on_rank, again.model_dump(), True)
    preflight(load_config(config, []), 1)
    # Of other tokens it is another data set, whatever the mask.
    write_examples(prefix, [(ids[::-1], mask) for ids, mask in examples])
    with pytest.raises(UserError, match="is of another data set than"):
        preflight(load_config(config, []), 1)


@pytest.mark.parametrize(
    "temperatures", [{"distill__temperature": 2.0}, {"distill__temperature": 1.5, "distill__teacher_temperature": 0.7}]
)
def test_with_every_id_a_run_is_the_online_run(
    run_ranks: Callable[..., list[Any]], folder: Path, tmp_path: Path, temperatures: dict[str, float]
) -> None:
    """Other seed, order, epochs, microbatches and layout than those it was written with."""
    write(run_ranks, 2, values(folder, **EVERY_ID, **temperatures, **layout(2)), tmp_path / "cache")
    course = {"run__seed": 9, "schedule__train_steps": 12, "data__global_batch_size": 4, **temperatures}
    cached = from_cache(folder, tmp_path / "cache", **course, **layout(2, 2, data__micro_batch_size=1))
    actual = losses(run_ranks, 4, cached, tmp_path / "cached")
    expected = losses(run_ranks, 1, values(folder, **course), tmp_path / "online")
    assert len(actual) == 12 and actual == pytest.approx(expected, rel=1e-5)


def drawn(path: Path) -> dict[int, list[dict[int, float]]]:
    reader = CacheReader(path)
    found = {}
    for sample_id in reader.sample_ids.tolist():
        rows = reader.read(sample_id).rows
        found[sample_id] = [
            {i: p for i, p in zip(ids, ps, strict=True) if i >= 0}
            for ids, ps in zip(rows.ids.tolist(), rows.probabilities.tolist(), strict=True)
        ]
    return found


def test_draws_do_not_depend_on_the_layout(run_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    folder = write_run_files(tmp_path / "files", samples=200)
    write(run_ranks, 1, values(folder), tmp_path / "one")
    one = drawn(tmp_path / "one")
    assert len(one) == 200
    for world, where in (LAYOUTS["tp2_sp"], LAYOUTS["tp2_pp2"], LAYOUTS["dp2"]):
        write(run_ranks, world, values(folder, **where), tmp_path / "other")
        other = drawn(tmp_path / "other")
        agree = [a == b for i in one for a, b in zip(one[i], other[i], strict=True)]
        assert len(agree) == 200 * SEQUENCE and np.mean(agree) >= 0.999
        shutil.rmtree(tmp_path / "other")


@pytest.mark.parametrize(
    "mode", [{"cache__num_samples": 16}, {"cache__mode": "topk", "cache__k": 40, "cache__tail_samples": 16}]
)
def test_draws_are_unbiased_and_the_loss_is_a_kl(
    run_ranks: Callable[..., list[Any]], folder: Path, tmp_path: Path, mode: dict[str, Any]
) -> None:
    """Mean over seeds of the draws, against the teacher itself."""
    online = run_ranks(1, first_step, values(folder))[0]
    seeds, total = 24, 0.0
    mean: dict[str, torch.Tensor] = {}
    for seed in range(seeds):
        path = tmp_path / str(seed)
        write(run_ranks, 1, values(folder, run__seed=seed, **mode), path)
        sums, gradient = run_ranks(1, first_step, from_cache(folder, path))[0]
        total += sums[1] / seeds
        for name, value in gradient.items():
            mean[name] = mean.get(name, 0.0) + value / seeds
    assert total == pytest.approx(online[0][1], rel=0.02)
    whole, found = (torch.cat([g[name].flatten() for name in sorted(online[1])]) for g in (online[1], mean))
    single = torch.cat([gradient[name].flatten() for name in sorted(online[1])])
    # Errors of independent seeds average out.
    assert (found - whole).norm() < 1.6 * (single - whole).norm() / seeds**0.5
    assert (found - whole).norm() < 0.1 * whole.norm()


@pytest.mark.parametrize("mode", [{}, {"cache__mode": "topk", "cache__k": 5}])
def test_an_interrupted_cache_goes_on_in_another_layout(
    run_ranks: Callable[..., list[Any]], folder: Path, tmp_path: Path, mode: dict[str, Any]
) -> None:
    settings = values(folder, **mode, **layout(data__micro_batch_size=4))
    settings["cache"] = settings.get("cache", {}) | {"path": str(tmp_path / "cache")}
    with pytest.raises(RuntimeError, match="interrupted here"):
        run_ranks(1, interrupted_on_rank, settings)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "cache").glob("shard-*.bin")}
    assert len(kept) >= 2 and not (tmp_path / "cache" / "manifest.json").exists()
    with pytest.raises(UserError, match="is no teacher cache.*It was begun and is not complete"):
        CacheReader(tmp_path / "cache")
    write(run_ranks, 2, values(folder, **mode, **layout(2)), tmp_path / "cache")
    for name, content in kept.items():
        assert (tmp_path / "cache" / name).read_bytes() == content
    write(run_ranks, 1, values(folder, **mode), tmp_path / "whole")
    assert drawn(tmp_path / "cache").keys() == drawn(tmp_path / "whole").keys()
    assert drawn(tmp_path / "cache") == drawn(tmp_path / "whole") or not mode


def interrupted_on_rank(settings: dict[str, Any]) -> None:
    """Shards of a few records; the third window is the last."""
    from unittest.mock import patch

    from megakd.teacher import OnlineTeacher

    original, calls = OnlineTeacher.signals, [0]

    def signals(self: OnlineTeacher, batches: Any) -> Any:
        calls[0] += 1
        if calls[0] == 5:
            raise RuntimeError("interrupted here")
        return original(self, batches)

    with (
        patch.object(OnlineTeacher, "signals", signals),
        patch("megakd.training.caching.WINDOW", 1),
        patch("megakd.training.caching.SHARD_BYTES", 1000),
    ):
        cache_on_rank(settings)


def test_a_cache_of_the_run_alone(run_ranks: Callable[..., list[Any]], folder: Path, tmp_path: Path) -> None:
    course = {"schedule__train_steps": 2, "cache__scope": "run"}
    manifest = write(run_ranks, 1, values(folder, **course), tmp_path / "cache")
    assert manifest.samples == 16
    preflight(config_from_dict(from_cache(folder, tmp_path / "cache", schedule__train_steps=2)), 1)
    losses(run_ranks, 1, from_cache(folder, tmp_path / "cache", schedule__train_steps=2), tmp_path / "run")
    with pytest.raises(
        UserError, match=r"lacks sample \d+, which this run visits; it has 16 samples \(cache.scope run\)"
    ):
        preflight(config_from_dict(from_cache(folder, tmp_path / "cache", schedule__train_steps=3)), 1)


@pytest.fixture(scope="module")
def cache(folder: Path, run_ranks: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "c"
    write(run_ranks, 1, values(folder, **DATA["blend"]), path)
    return path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distill__temperature": 2.0}, r"distill.temperature is 2; .* at temperature 1 and no other"),
        ({"distill__teacher_temperature": 0.5}, r"teacher_temperature is 0.5; .*Set .*teacher_temperature to 1"),
        ({"data__sequence_length": 8}, "data.sequence_length is 8; .* was written with 16, so its samples are others"),
        ({"data__packing": False, "data__train": "chat"}, "data.packing is false; .* was written with true"),
        ({"data__loss_on": "all"}, "data.loss_on is all; .* was written with assistant"),
        ({"data__truncation": "keep_end"}, "data.truncation is keep_end"),
        ({"data__train": ["chat", "other"]}, r"is of 2 other data sets than .*other \(written from .*chat, .*data\)"),
        ({"data__reset_attention_mask": True}, "data.reset_attention_mask is true; .* was written with false"),
        ({"data__valid_fraction": 0.1}, "data.valid_fraction is 0.1; .* was written with null"),
        ({"distill__loss": "reverse_kl"}, "teacher.source is cache and distill.loss is reverse_kl; only forward_kl"),
        ({"distill__kd_weight": 0.0, "distill__ce_weight": 1.0}, "has no effect with distill.kd_weight 0"),
        ({"teacher__dtype": "bf16"}, "teacher.dtype is bf16 and has no effect on a cache"),
    ],
)  # fmt: skip
def test_a_run_that_the_cache_does_not_fit(folder: Path, cache: Path, settings: dict[str, Any], message: str) -> None:
    write_tokens(folder / "other", learnable_tokens(40 * SEQUENCE + 1)[::-1].copy())
    teacher = settings.pop("teacher__dtype", None)
    found = from_cache(folder, cache, **{**DATA["blend"], **settings})
    if teacher is not None:
        found["teacher"]["dtype"] = teacher
    with pytest.raises(UserError, match=message):
        preflight(config_from_dict(found), 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache__k": 301}, "cache.k is 301; the models share 300 ids. Use at most 300."),
        ({"cache__k": 300, "cache__tail_samples": 2}, "cache.tail_samples is 2 and cache.k is all 300 ids; nothing is"),
    ],
)
def test_ids_that_are_not_there_to_store(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cache_codec(config_from_dict(values(folder, cache__mode="topk", **settings)))


@pytest.mark.parametrize(
    "settings",
    [
        {"data__train": ["data", "chat"], "data__packing": True},
        {"data__train": "chat", "data__packing": True, "data__loss_on": "response"},
        {"data__train": "data", "data__valid_fraction": 0.25, "data__eod_mask_loss": True},
    ],
)
def test_runs_of_a_part_in_another_order_or_with_fewer_tokens(
    run_ranks: Callable[..., list[Any]], folder: Path, cache: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    found = from_cache(folder, cache, **settings)
    preflight(config_from_dict(found), 1)
    assert len(losses(run_ranks, 1, found, tmp_path / "run")) == 4


def test_a_smaller_student_is_refused(folder: Path, cache: Path) -> None:
    found = from_cache(folder, cache, **DATA["blend"])
    found["student"] = {
        "architecture": {
            "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4,
            "vocab_size": VOCAB - 1, "max_position_embeddings": SEQUENCE,
        }
    }  # fmt: skip
    with pytest.raises(UserError, match=f"is of {VOCAB} ids and the student knows {VOCAB - 1}"):
        preflight(config_from_dict(found), 1)


def test_damage_found_while_training_names_shard_and_sample(
    run_ranks: Callable[..., list[Any]], folder: Path, cache: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    for shard in copy.glob("shard-*.bin"):
        content = bytearray(shard.read_bytes())
        for place in range(64, len(content) - 2000, 40):
            content[place] ^= 4
        shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-000000.bin: sample \d+ is damaged \(its checksum is of other bytes\)"):
        run_ranks(2, losses_on_rank, from_cache(folder, copy, **DATA["blend"], **layout(2)))
