"""GPTModel whose last stage yields (hidden state, head) for a loss that multiplies them chunk by chunk."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from megakd.config.architecture import GPTArchitecture
from megakd.models.initialize import initialize_parameters
from megakd.models.layer_specs import build_block_spec
from megakd.models.parameters import mark_tensor_parallel
from megakd.parallel.mesh import ModelMesh
from megakd.parameters.shapes import padded_vocab_size

_ACTIVATIONS = {"swiglu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


class OutputHead(ColumnParallelLinear):
    """The output layer as the keeper of its weight: the product with it is the loss's business.

    Reading the weight in here, and not from outside, lets the pre-forward hook of overlapped parameter gathering
    finish first: outside, the weight may be the one before the last step.
    """

    def forward(  # type: ignore[override]
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the final hidden state [s(/tp), b, h] and the head shard [v/tp, h]; `weight` is given when tied."""
        return input_, self.weight if weight is None else weight


class HiddenStateGPT(GPTModel):
    """megatron-core's GPTModel without logits.

    The last stage returns (hidden [s, b, h], head [v/tp, h]); with sequence parallelism hidden is [s/tp, b, h].
    Without a head (`drop_head`) it returns hidden alone. Other stages return their hidden state.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            # Same parameters, names and checkpoint entries; only what forward does with them differs.
            self.output_layer.__class__ = OutputHead  # type: ignore[assignment]

    def drop_head(self) -> None:
        """Free the output layer of a model whose head is kept elsewhere."""
        if self.post_process:
            self.output_layer = None

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.post_process or self.output_layer is None:
            return hidden_states
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden_states, weight=tied)

    def tie_embeddings_and_output_weights_state_dict(
        self,
        sharded_state_dict: dict[str, Any],
        output_layer_weight_key: str,
        first_stage_word_emb_key: str,
        metadata: dict[str, Any],
    ) -> None:
        """Make a head tied across stages a copy of the embedding in checkpoints.

        megatron-core's own version takes the copy's data rank from its global state, which does not exist here.
        """
        if not self.post_process or self.pre_process:
            return
        dp_cp_group = metadata["dp_cp_group"]
        sharded_state_dict[output_layer_weight_key] = make_tp_sharded_tensor_for_checkpoint(
            tensor=self.shared_embedding_or_output_weight(),
            key=first_stage_word_emb_key,
            replica_id=(1, 0, dp_cp_group.rank()),
            allow_shape_mismatch=True,
            tp_group=self.tp_group,
            dp_cp_group=dp_cp_group,
        )


def build_gpt(
    architecture: GPTArchitecture,
    mesh: ModelMesh,
    *,
    dtype: torch.dtype,
    layer_spec: str,
    make_vocab_size_divisible_by: int = 128,
    sequence_parallel: bool = False,
    recompute_granularity: str = "none",
    num_layers_in_first_pipeline_stage: int | None = None,
    num_layers_in_last_pipeline_stage: int | None = None,
    head: bool = True,
    seed: int | None = None,
) -> HiddenStateGPT:
    """Build this rank's stage of a GPT model on `mesh`.

    Args:
        layer_spec: "local" or "transformer_engine" (see resolve_layer_spec).
        head: False for a model whose output head is kept elsewhere.
        seed: Initialise randomly; the model is the same for a seed under every layout. None leaves the values
            undefined, to be loaded.

    Returns:
        The stage, on the platform's device, parameters in `dtype`.
    """
    config = transformer_config(
        architecture,
        mesh,
        dtype=dtype,
        sequence_parallel=sequence_parallel,
        recompute_granularity=recompute_granularity,
        num_layers_in_first_pipeline_stage=num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=num_layers_in_last_pipeline_stage,
    )
    num_layers = get_num_layers_to_build(config, pp_rank=mesh.pp_rank)
    model = HiddenStateGPT(
        config,
        build_block_spec(architecture, layer_spec, num_layers),
        vocab_size=padded_vocab_size(architecture.vocab_size, make_vocab_size_divisible_by),
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=mesh.is_first_stage,
        post_process=mesh.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=architecture.share_embeddings_and_output_weights,
        position_embedding_type=architecture.position_embedding_type,
        rotary_base=architecture.rotary_base,  # type: ignore[arg-type]
        rotary_percent=architecture.rotary_percent,
        pg_collection=mesh.groups,
    )
    if architecture.position_embedding_type == "rope" and architecture.rope_scaling is not None:
        scaling = architecture.rope_scaling.model_dump()
        model.rotary_pos_emb.inv_freq = model.rotary_pos_emb._apply_scaling(model.rotary_pos_emb.inv_freq, **scaling)
    if not head:
        model.drop_head()
    mark_tensor_parallel(model, architecture)
    # megatron-core builds learned positions in fp32 and leaves the cast to a wrapper that is not used here.
    model.to(dtype)
    if seed is not None:
        initialize_parameters(model, architecture, mesh, seed, make_vocab_size_divisible_by)
    return model.to(torch.cuda.current_device())


def transformer_config(
    architecture: GPTArchitecture,
    mesh: ModelMesh,
    *,
    dtype: torch.dtype,
    sequence_parallel: bool,
    recompute_granularity: str,
    num_layers_in_first_pipeline_stage: int | None,
    num_layers_in_last_pipeline_stage: int | None,
) -> TransformerConfig:
    """megatron-core's configuration of this model on this mesh.

    Its fusions through torch.compile stay off: on CPU they need a compiler, and on GPU Transformer Engine's layers
    bring their own.
    """
    if num_layers_in_first_pipeline_stage is None and num_layers_in_last_pipeline_stage is not None:
        if mesh.pp_size == 2:
            num_layers_in_first_pipeline_stage = architecture.num_layers - num_layers_in_last_pipeline_stage
    elif num_layers_in_first_pipeline_stage is not None and num_layers_in_last_pipeline_stage is None:
        if mesh.pp_size == 2:
            num_layers_in_last_pipeline_stage = architecture.num_layers - num_layers_in_first_pipeline_stage
    full = recompute_granularity == "full"
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.kv_channels,
        normalization=architecture.normalization,
        layernorm_epsilon=architecture.layernorm_epsilon,
        gated_linear_unit=architecture.activation == "swiglu",
        activation_func=_ACTIVATIONS[architecture.activation],
        add_bias_linear=architecture.add_bias_linear,
        add_qkv_bias=architecture.add_qkv_bias,
        qk_layernorm=architecture.qk_layernorm,
        **_experts(architecture),
        # megatron-core counts the tokens to the left and to the right of a token, itself not included.
        window_size=None if architecture.sliding_window is None else (architecture.sliding_window - 1, 0),
        init_method_std=architecture.init_method_std,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=mesh.tp_size,
        pipeline_model_parallel_size=mesh.pp_size,
        context_parallel_size=mesh.cp_size,
        sequence_parallel=sequence_parallel and mesh.tp_size > 1,
        num_layers_in_first_pipeline_stage=num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=num_layers_in_last_pipeline_stage,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        recompute_granularity=None if recompute_granularity == "none" else recompute_granularity,  # type: ignore[arg-type]
        recompute_method="uniform" if full else None,
        recompute_num_layers=1 if full else None,
        calculate_per_token_loss=True,
        perform_initialization=False,
        cuda_graph_scope=[],
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )


def _experts(architecture: GPTArchitecture) -> dict[str, Any]:
    if architecture.num_moe_experts is None:
        return {}
    return {
        "num_moe_experts": architecture.num_moe_experts,
        "moe_ffn_hidden_size": architecture.mlp_width,
        "moe_router_topk": architecture.moe_router_topk,
        "moe_router_pre_softmax": architecture.moe_router_pre_softmax,
        # The divergence teaches the router; it is not pushed towards using all experts alike.
        "moe_router_load_balancing_type": "none",
        # Experts are cut over tensor ranks, which all see every token, so nothing but a gather is needed.
        "moe_token_dispatcher_type": "allgather",
    }
