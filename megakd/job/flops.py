"""Floating-point operations a step needs, whatever is recomputed: the numerator of model FLOPs utilisation."""

from __future__ import annotations

from megakd.config.architecture import GPTArchitecture


def forward_flops_per_token(architecture: GPTArchitecture, sequence_length: int) -> float:
    """Return the operations of a forward pass, a multiply-add counted as two.

    The convention of the PaLM report (arXiv 2204.02311, appendix B), with attention as `attention_products` has it.
    """
    a = architecture
    layer = layer_products(a) + attention_products(a, sequence_length)
    return 2.0 * (a.num_layers * layer + a.hidden_size * a.vocab_size)


def attention_products(architecture: GPTArchitecture, sequence_length: int) -> float:
    """Return the multiply-adds of a token's scores and of its sum of values, over all heads of a layer.

    Causal attention is half a square; with a sliding window each position sees at most so many.
    """
    a, seen = architecture, sequence_length / 2
    if a.sliding_window is not None and a.sliding_window < sequence_length:
        seen = a.sliding_window - a.sliding_window**2 / (2 * sequence_length)
    return 2 * a.num_attention_heads * a.kv_channels * seen


def layer_products(architecture: GPTArchitecture) -> int:
    """Return the multiply-adds of a token with a layer's weights, those of the experts it goes to."""
    a = architecture
    query, kv = a.num_attention_heads * a.kv_channels, a.num_query_groups * a.kv_channels
    projections = a.hidden_size * (query + 2 * kv) + query * a.hidden_size
    mlp = a.mlps_per_token * a.hidden_size * a.mlp_width * (3 if a.activation == "swiglu" else 2)
    return projections + mlp + a.hidden_size * (a.num_moe_experts or 0)


def step_flops(student: GPTArchitecture, teacher: GPTArchitecture | None, sequence_length: int, tokens: int) -> float:
    """Return the operations of the student's forward and backward (three forwards) and of a teacher's forward."""
    per_token = 3 * forward_flops_per_token(student, sequence_length)
    if teacher is not None:
        per_token += forward_flops_per_token(teacher, sequence_length)
    return per_token * tokens
