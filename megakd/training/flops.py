"""Floating-point operations a step needs, whatever is recomputed: the numerator of model FLOPs utilisation."""

from __future__ import annotations

from megakd.config.architecture import GPTArchitecture


def forward_flops_per_token(architecture: GPTArchitecture, sequence_length: int) -> float:
    """Multiply-adds of a forward pass counted as two, causal attention as half a square.

    The convention of the PaLM report (arXiv 2204.02311, appendix B) with the attention term halved for the mask.
    """
    a = architecture
    attention = a.num_attention_heads * a.kv_channels * sequence_length
    return 2.0 * (a.num_layers * (layer_products(a) + attention) + a.hidden_size * a.vocab_size)


def layer_products(architecture: GPTArchitecture) -> int:
    """Multiply-adds of a token with a layer's weights, those of the experts it goes to."""
    a = architecture
    query, kv = a.num_attention_heads * a.kv_channels, a.num_query_groups * a.kv_channels
    projections = a.hidden_size * (query + 2 * kv) + query * a.hidden_size
    mlp = a.mlps_per_token * a.hidden_size * a.mlp_width * (3 if a.activation == "swiglu" else 2)
    return projections + mlp + a.hidden_size * (a.num_moe_experts or 0)


def step_flops(student: GPTArchitecture, teacher: GPTArchitecture | None, sequence_length: int, tokens: int) -> float:
    """Student forward and backward (three forwards) and, where it runs, the teacher's forward."""
    per_token = 3 * forward_flops_per_token(student, sequence_length)
    if teacher is not None:
        per_token += forward_flops_per_token(teacher, sequence_length)
    return per_token * tokens
