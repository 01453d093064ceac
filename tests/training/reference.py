"""Distillation as anyone would write it: two transformers models, torch AdamW, one process, no megakd."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

STEPS, SEQUENCE, GLOBAL_BATCH, VOCAB = 20, 32, 8, 300
LR, WEIGHT_DECAY, BETAS, EPS, CLIP = 4e-3, 0.1, (0.9, 0.95), 1e-8, 1.0
KD_WEIGHT, CE_WEIGHT, TEMPERATURE = 0.3, 1.0, 1.5


def save_model(folder: Path, *, layers: int, hidden: int, tied: bool, seed: int, std: float) -> None:
    """A random Llama with grouped queries, in Hugging Face format."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
        initializer_range=std, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    save_random(folder, config, seed)


def save_random(folder: Path, config: PretrainedConfig, seed: int) -> None:
    """A random model of this configuration, in Hugging Face format."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # norms that are not all one, so that a forgotten one shows
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def token_stream() -> np.ndarray:
    """A corpus with something to learn: sixteen tokens make up most of it, each a function of the one before."""
    generator = np.random.default_rng(7)
    table = generator.permutation(VOCAB)
    stream = np.zeros(STEPS * GLOBAL_BATCH * SEQUENCE + 1, dtype=np.int64)
    for i in range(1, len(stream)):
        stream[i] = table[stream[i - 1] % 16] if generator.random() < 0.9 else generator.integers(VOCAB)
    return stream


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def jsd(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    return (kl(log_p, log_m) + kl(log_q, log_m)) / 2


DIVERGENCES = {"forward_kl": kl, "reverse_kl": lambda log_p, log_q: kl(log_q, log_p), "jsd": jsd}


class ReferenceRun:
    """Losses of every step and the first step's gradients by Hugging Face name."""

    def __init__(self, student: Path, teacher: Path, batches: list[torch.Tensor], loss: str = "forward_kl") -> None:
        self.divergence = DIVERGENCES[loss]
        model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
        guide = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
        decayed = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() == 1]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
            lr=LR, betas=BETAS, eps=EPS,
        )  # fmt: skip
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.first_gradient: dict[str, torch.Tensor] = {}
        for batch in batches:
            loss = self._loss(model, guide, batch)
            optimizer.zero_grad()
            loss.backward()
            if not self.first_gradient:
                self.first_gradient = _gradients(model)
            self.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
            optimizer.step()
            self.losses.append(loss.item())

    def _loss(self, model: PreTrainedModel, guide: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
        tokens, labels = batch[:, :-1], batch[:, 1:]
        z = model(tokens).logits.double()
        with torch.no_grad():
            u = guide(tokens).logits.double()
        log_q, log_p = (z / TEMPERATURE).log_softmax(-1), (u / TEMPERATURE).log_softmax(-1)
        kd = self.divergence(log_p, log_q).mean()
        ce = -z.log_softmax(-1).gather(-1, labels[..., None]).mean()
        return KD_WEIGHT * TEMPERATURE**2 * kd + CE_WEIGHT * ce


def _gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Gradients under the names that the weights have on disk, which are others than in memory for experts."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, original in zip(twin.parameters(), model.parameters(), strict=True):
            assert original.grad is not None
            parameter.copy_(original.grad)
    with tempfile.TemporaryDirectory() as folder:
        twin.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")
