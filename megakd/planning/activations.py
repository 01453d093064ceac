"""Bytes that a layer keeps for its backward pass, and those that pass by on the way.

The terms name what autograd saves in the local layers (`models/layer_specs.py`), found by looking and held to it by a
test. With kernels that keep the input of a norm alone, as on GPU, it is the count of Korthikanti et al. (arXiv
2205.05198) for a gated MLP and grouped queries.
"""

from __future__ import annotations

from megakd.planning.job import Job, Model


def norm_bytes(job: Job, model: Model, width: int, rows: float = 1.0) -> float:
    """What a norm of `rows` vectors keeps beside its output."""
    e, a = model.element_size, model.architecture
    if a.normalization == "LayerNorm":
        return rows * (width * e + 2 * e)
    if job.has_fused_norms:
        return rows * (width * e + 4)
    # torch composes RMSNorm on CPU: the input and the normalised input in fp32, and the factor.
    return rows * (2 * width * 4 + 4)


def layer_bytes(job: Job, model: Model, *, recompute: str = "none") -> float:
    """Bytes that a layer keeps of a token between forward and backward, on one tensor rank.

    Args:
        recompute: as student.recompute_granularity: "full" keeps the layer's input alone.
    """
    a, e, layout = model.architecture, model.element_size, model.layout
    shards = layout.sequence_shards
    hidden = a.hidden_size * e / shards
    if recompute == "full":
        return hidden
    norm = norm_bytes(job, model, a.hidden_size) / shards + hidden
    return 2 * norm + _attention_bytes(job, model, recompute) + _mlp_bytes(model)


def layer_rotary_bytes(job: Job, model: Model, *, recompute: str = "none") -> float:
    """Bytes a layer keeps of each position, whatever the number of samples: cosines and sines, twice."""
    a = model.architecture
    if a.position_embedding_type != "rope" or recompute == "full":
        return 0.0
    return 4 * int(a.kv_channels * a.rotary_percent) * model.element_size


def _attention_bytes(job: Job, model: Model, recompute: str) -> float:
    a, e, tp = model.architecture, model.element_size, model.layout.tp
    heads, groups = a.num_attention_heads / tp, a.num_query_groups / tp
    query, key = heads * a.kv_channels, groups * a.kv_channels
    # The joint product's result, which the values are a view of; the turned queries and keys; the output.
    total = (query + 2 * key) * e + (query + key) * e + query * e
    if a.position_embedding_type != "rope":
        total -= (query + key) * e
    if recompute != "selective":
        total += heads * 4  # log of the sum of each row's exponentials
    if a.qk_layernorm:
        # The queries are copied out of the joint product; the keys' norm keeps a view of it, unless it casts.
        total += (heads + groups) * norm_bytes(job, model, a.kv_channels)
        if job.has_fused_norms or e == 4 or a.normalization == "LayerNorm":
            total -= key * e
    return total


def _mlp_bytes(model: Model) -> float:
    a, e, tp = model.architecture, model.element_size, model.layout.tp
    width = a.mlp_width / tp * a.mlps_per_token
    # Gate and value, the gate shifted by 0, its activation, and the product; or input and output of the activation.
    return width * e * (5 if a.activation == "swiglu" else 2)


def backward_bytes(model: Model) -> float:
    """Bytes of a token that pass by at the worst point of a layer's backward pass: gradients of activations."""
    a, e, tp = model.architecture, model.element_size, model.layout.tp
    width = a.mlp_width / tp * a.mlps_per_token * e
    residual = a.hidden_size * e / model.layout.sequence_shards
    gathered = a.hidden_size * e
    return residual + gathered + width * (3 if a.activation == "swiglu" else 2)


def forward_bytes(model: Model) -> float:
    """Bytes of a token at the worst point of a layer's forward pass without gradients."""
    a, e, tp = model.architecture, model.element_size, model.layout.tp
    width = a.mlp_width / tp * a.mlps_per_token * e
    residual = a.hidden_size * e / model.layout.sequence_shards
    return 2 * residual + a.hidden_size * e + width * (4 if a.activation == "swiglu" else 2)
