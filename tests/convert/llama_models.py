"""Small random Llama models of transformers, and megatron-core's layout of their weights written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

GROUPED: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4}
ALL_HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4}


def save_llama(path: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> LlamaForCausalLM:
    """Save a random model; every weight is random, the norms' and biases' too."""
    settings: dict[str, Any] = {
        "vocab_size": 130,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "max_position_embeddings": 64,
        "bos_token_id": 3,
        "eos_token_id": [5, 7],
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(settings | GROUPED | overrides))).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(path, max_shard_size=overrides.get("max_shard_size", "5GB"))
    return model


def megatron_shard(
    name: str, weights: dict[str, Tensor], config: LlamaConfig, tp_rank: int, tp_size: int, padded_vocab: int
) -> Tensor:
    """One tensor rank's shard of a parameter, gathered row by row from the Hugging Face weights."""

    def rows_of(weight: Tensor) -> Tensor:
        return torch.stack(list(weight)[tp_rank * len(weight) // tp_size : (tp_rank + 1) * len(weight) // tp_size])

    def vocabulary(weight: Tensor) -> Tensor:
        padded = torch.zeros(padded_vocab, weight.shape[1], dtype=weight.dtype)
        padded[: weight.shape[0]] = weight
        return rows_of(padded)

    if name == "embedding.word_embeddings.weight" or (name == "output_layer.weight" and config.tie_word_embeddings):
        return vocabulary(weights["model.embed_tokens.weight"])
    if name == "output_layer.weight":
        return vocabulary(weights["lm_head.weight"])
    if name == "decoder.final_layernorm.weight":
        return weights["model.norm.weight"]
    _, _, layer, rest = name.split(".", 3)
    hf = f"model.layers.{layer}."
    kind = rest.rsplit(".", 1)[1]
    if "linear_qkv.layer_norm" in rest:
        return weights[hf + "input_layernorm.weight"]
    if "linear_fc1.layer_norm" in rest:
        return weights[hf + "post_attention_layernorm.weight"]
    if "linear_qkv" in rest:
        q, k, v = (weights[f"{hf}self_attn.{part}_proj.{kind}"] for part in "qkv")
        d, groups = config.head_dim, config.num_key_value_heads
        heads = config.num_attention_heads // groups
        blocks = []
        for group in range(tp_rank * groups // tp_size, (tp_rank + 1) * groups // tp_size):
            blocks += [q[(group * heads + head) * d : (group * heads + head + 1) * d] for head in range(heads)]
            blocks += [k[group * d : (group + 1) * d], v[group * d : (group + 1) * d]]
        return torch.cat(blocks)
    if "linear_fc1" in rest:
        return torch.cat([rows_of(weights[f"{hf}mlp.{part}_proj.{kind}"]) for part in ("gate", "up")])
    weight = weights[hf + ("self_attn.o_proj." if "linear_proj" in rest else "mlp.down_proj.") + kind]
    return weight if kind == "bias" else rows_of(weight.T).T
