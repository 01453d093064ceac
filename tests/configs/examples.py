"""The files in configs/: what they say, on folders that hold no weights, and small enough to train on two cores."""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from megakd.data.token_writer import TokenWriter, token_dtype
from tests.data.example_files import write_examples
from tests.training.runs import learnable_tokens, write_tokens

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "configs" / "models"
FILES = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))

SEQUENCE = 32
# Multiples of 128 that differ, as Qwen's do.
SMALL_VOCABULARIES = {128256: 256, 151936: 256, 152064: 384}


@dataclass(frozen=True)
class Cluster:
    """What a file's header says that it is for."""

    nodes: int
    gpus_per_node: int
    gigabytes: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node


def cluster_of(name: str) -> Cluster:
    """The line `# Cluster: ...` of a file."""
    text = (ROOT / "configs" / name).read_text()
    (found,) = re.findall(r"^# Cluster: (\d+) nodes? of (\d+) GPUs of (\d+) GB\.$", text, flags=re.MULTILINE)
    return Cluster(*(int(number) for number in found))


def read_values(name: str) -> dict[str, Any]:
    """A file as nested mappings."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "configs" / name).read_text())
    return values


def shape_folder(path: str) -> Path:
    """The folder in configs/models with the shape of a model: an instruction-tuned one has its base's."""
    assert path.startswith("models/"), path
    return MODELS / path.removeprefix("models/").removesuffix("-Instruct")


def model_keys(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The sections whose `path` is a model's."""
    return [values["teacher"], values["student"]["init"]]


def with_sparse_files(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Models and data replaced by files of the right names and sizes that take no room, all zeros."""
    for section in model_keys(values):
        section["path"] = str(_sparse_model(folder / section["path"], shape_folder(section["path"])))
    for source in _sources(values):
        prefix = folder / source["path"]
        if not prefix.with_suffix(".idx").exists():
            prefix.parent.mkdir(parents=True, exist_ok=True)
            if values["data"].get("packing"):
                write_examples(prefix, [([1, 2, 3], [0, 2, 2])] * 3000)
            else:
                _sparse_text(prefix, 2000 * values["data"]["sequence_length"] + 1)
        source["path"] = str(prefix)
    values["run"]["output_dir"] = str(folder / "run")
    return values


def scaled_down(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same keys with small values, on random models and data: at most 4 ranks, two steps."""
    values["run"] |= {"output_dir": str(folder / "run"), "layer_spec": "local"}
    parallel, data = values["parallel"], values["data"]
    own = values["teacher"].get("parallel", {})
    for section in (parallel, own):
        for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
            if key in section:
                section[key] = min(section[key], 2)
    if "ranks" in values["teacher"]:
        values["teacher"]["ranks"] = own["tensor_model_parallel_size"]
    # Of the small student's four layers on two stages.
    for key, layers in (("num_layers_in_first_pipeline_stage", 3), ("num_layers_in_last_pipeline_stage", 1)):
        if key in parallel:
            parallel[key] = layers
    for seed, section in enumerate(model_keys(values)):
        section["path"] = str(_small_model(folder / section["path"], shape_folder(section["path"]), seed))
    data |= {"sequence_length": SEQUENCE, "micro_batch_size": 1, "global_batch_size": 4}
    vocab = min(SMALL_VOCABULARIES.values())
    for seed, source in enumerate(_sources(values)):
        prefix = folder / source["path"]
        prefix.parent.mkdir(parents=True, exist_ok=True)
        if data.get("packing"):
            write_examples(prefix, _conversations(vocab))
        else:
            write_tokens(prefix, np.roll(learnable_tokens(64 * SEQUENCE + 1, vocab), seed), vocab)
        source["path"] = str(prefix)
    for key in ("valid_fraction", "test_fraction"):
        if key in data:
            data[key] = 0.1
    for key in ("train_steps", "train_tokens", "train_epochs"):
        values["schedule"].pop(key, None)
    values["schedule"] |= {"train_steps": 2, "lr_warmup_steps": 1}
    values["checkpoint"] |= {"save_interval": 1}
    values["logging"] |= {"log_interval": 1}
    values["evaluation"] |= {"interval": 1, "max_tokens": 4 * SEQUENCE}
    return values


def ranks_of(values: dict[str, Any]) -> int:
    """The student's: two replicas where all ranks are at most 4, else one."""
    parallel, of_teacher = values["parallel"], values["teacher"].get("ranks", 0)
    replica: int = parallel["tensor_model_parallel_size"] * parallel["pipeline_model_parallel_size"]
    return replica * (2 if 2 * replica + of_teacher <= 4 else 1)


def _sources(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of data.train, as sections in place."""
    train = values["data"]["train"]
    sections = [{"path": entry} if isinstance(entry, str) else entry for entry in _as_list(train)]
    values["data"]["train"] = sections
    return sections


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _sparse_text(prefix: Path, tokens: int) -> None:
    """A pair of one document of so many tokens 0, nearly all of it a hole."""
    writer = TokenWriter(prefix, token_dtype(10))
    writer.add(np.zeros(1, dtype=np.int64), np.array([1], dtype=np.int32))
    writer.finish()
    index = bytearray(prefix.with_suffix(".idx").read_bytes())
    # magic 9, version 8, type 1, sequences 8, documents 8: the length of the only sequence follows
    index[34:38] = struct.pack("<i", tokens)
    prefix.with_suffix(".idx").write_bytes(index)
    with prefix.with_suffix(".bin").open("r+b") as file:
        file.truncate(tokens * np.dtype(token_dtype(10)).itemsize)


def _sparse_model(folder: Path, shape: Path) -> Path:
    """A Hugging Face folder with a header for every weight of the shape, and holes where the weights would be."""
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    config = json.loads((shape / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: list(weight.shape) for name, weight in meta_model(shape).state_dict().items()}
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    file_of: dict[str, str] = {}
    names = list(weights)
    for start in range(0, len(names), 32):  # in files as published models have them, some GB each
        file = f"model-{start:05d}.safetensors"
        _sparse_weights(folder / file, {name: weights[name] for name in names[start : start + 32]})
        file_of |= dict.fromkeys(names[start : start + 32], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    return folder


def _sparse_weights(path: Path, weights: dict[str, list[int]]) -> None:
    """A safetensors file of bf16 weights with these shapes, all a hole behind its header."""
    header, end = {}, 0
    for name, shape in weights.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + end)


def meta_model(shape: Path) -> Any:
    """The transformers model of a shape, without storage."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(shape))


def _small_model(folder: Path, shape: Path, seed: int) -> Path:
    """A random model of the same family and options as a shape, with few and small layers."""
    config = AutoConfig.from_pretrained(shape)
    config.update({
        "vocab_size": SMALL_VOCABULARIES[config.vocab_size], "num_hidden_layers": 4, "head_dim": 8,
        "hidden_size": 48 if seed == 0 else 32, "intermediate_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
    })  # fmt: skip
    if hasattr(config, "layer_types") and config.layer_types is not None:
        config.layer_types = config.layer_types[:4]
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _conversations(vocab: int) -> list[tuple[list[int], list[int]]]:
    """Examples of 6 to 30 tokens: a question, and an answer that is learnt."""
    draw = np.random.default_rng(3)
    sizes = draw.integers(6, 31, size=60)
    return [(draw.integers(vocab, size=n).tolist(), [0] * (n // 2) + [2] * (n - n // 2)) for n in sizes.tolist()]
