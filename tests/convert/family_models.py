"""Small random models of transformers, at least one for every family that has a table."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers

_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
_LLAMA_LIKE = _SIZES | {
    "num_key_value_heads": 2, "vocab_size": 131, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}  # fmt: skip
_LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_GPT2 = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64, "vocab_size": 131}

_EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", _LLAMA_LIKE | {"num_key_value_heads": 4}),
    "llama3_tied": ("Llama", _LLAMA_LIKE | {"rope_parameters": _LLAMA_3, "tie_word_embeddings": True}),
    "mistral": ("Mistral", _LLAMA_LIKE | {"head_dim": 32, "sliding_window": None}),
    "mistral_window": ("Mistral", _LLAMA_LIKE | {"sliding_window": 16}),
    "mixtral": ("Mixtral", _LLAMA_LIKE | _EXPERTS | {"num_local_experts": 4, "sliding_window": 20}),
    "qwen2": ("Qwen2", _LLAMA_LIKE),
    "qwen2_tied": ("Qwen2", _LLAMA_LIKE | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", _LLAMA_LIKE | {"head_dim": 32}),
    "qwen3_tied": ("Qwen3", _LLAMA_LIKE | {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3Moe",
        _LLAMA_LIKE
        | _EXPERTS
        | {"num_experts": 6, "moe_intermediate_size": 48, "head_dim": 32, "norm_topk_prob": True},
    ),
    "qwen3_moe_tied": (
        "Qwen3Moe",
        _LLAMA_LIKE
        | _EXPERTS
        | {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 32}
        | {"tie_word_embeddings": True, "norm_topk_prob": False},
    ),
    "phi3": ("Phi3", _LLAMA_LIKE | {"sliding_window": 20}),
    "phi3_partial_rotary": (
        "Phi3",
        _LLAMA_LIKE
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.75}}
        | {"tie_word_embeddings": True},
    ),
    "gpt2": ("GPT2", _GPT2),
    "gpt2_untied": ("GPT2", _GPT2 | {"n_inner": 96, "tie_word_embeddings": False, "activation_function": "gelu"}),
}
"""Family, and what its configuration says."""


def save_model(path: Path, name: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """Save a model with every weight random, the norms' and biases' too, and outputs of about unit size."""
    family, settings = MODELS[name]
    known = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 3)
    # Phi-3's configuration writes into the rope settings it is given.
    config = getattr(transformers, f"{family}Config")(**known, **deepcopy(settings))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15 if parameter.dim() > 1 else 0.5)
    model = model.to(dtype)
    model.save_pretrained(path)
    return model
