"""What a GPT model looks like, whichever format it came from, in megatron-core's words."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RopeScaling(BaseModel):
    """Llama 3.1's frequency scaling; the four numbers of `rope_scaling` in config.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    factor: float = Field(gt=0)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(gt=0)

    @model_validator(mode="after")
    def _bands_in_order(self) -> RopeScaling:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor ({self.low_freq_factor}) must be below high_freq_factor ({self.high_freq_factor})"
            )
        return self


def _not_required_in_files(schema: dict[str, Any]) -> None:
    """Editors that check a file by the JSON schema must not ask for what `_fill_defaults` fills in."""
    schema["required"] = [key for key in schema["required"] if key not in ("num_query_groups", "kv_channels")]


class GPTArchitecture(BaseModel):
    """Shape and options of a GPT model. `vocab_size` is the true one, before padding."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, json_schema_extra=_not_required_in_files
    )

    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    ffn_hidden_size: int = Field(gt=0, description="Width between the two linear layers of the MLP.")
    num_attention_heads: int = Field(gt=0)
    num_query_groups: int = Field(gt=0, description="Key and value heads; num_attention_heads where not given.")
    kv_channels: int = Field(gt=0, description="Size of a head; hidden_size / num_attention_heads where not given.")
    vocab_size: int = Field(gt=0, description="True size, before padding.")
    max_position_embeddings: int = Field(gt=0, description="Tokens the model has positions for.")
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    layernorm_epsilon: float = Field(default=1e-5, gt=0)
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    position_embedding_type: Literal["rope", "learned_absolute"] = "rope"
    rotary_base: float = Field(default=10000.0, gt=0)
    rotary_percent: float = Field(default=1.0, gt=0, le=1, description="Part of each head's channels that rope turns.")
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = Field(
        default=None, gt=0, description="Tokens, itself included, that a token attends to."
    )
    num_moe_experts: int | None = Field(
        default=None, gt=0, description="Experts in place of the MLP of every layer (Mixtral, Qwen3-MoE)."
    )
    moe_ffn_hidden_size: int | None = Field(
        default=None, gt=0, description="Width of an expert; ffn_hidden_size where not given."
    )
    moe_router_topk: int = Field(default=2, gt=0, description="Experts that a token goes to.")
    moe_router_pre_softmax: bool = Field(
        default=False, description="Weights of a token's experts are its softmax over all experts, not over its own."
    )
    share_embeddings_and_output_weights: bool = False
    init_method_std: float = Field(default=0.02, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: object) -> object:
        """Head size and query groups follow from hidden size and heads where they are not given."""
        if isinstance(values, dict):
            values = dict(values)
            heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
            if isinstance(heads, int) and heads > 0:
                values.setdefault("num_query_groups", heads)
                if isinstance(hidden, int) and "kv_channels" not in values:
                    if hidden % heads:
                        raise ValueError(
                            f"hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads}) where "
                            "kv_channels is not given"
                        )
                    values["kv_channels"] = hidden // heads
        return values

    @model_validator(mode="after")
    def _heads_divide(self) -> GPTArchitecture:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_query_groups ({self.num_query_groups})"
            )
        return self

    @model_validator(mode="after")
    def _rope_fits(self) -> GPTArchitecture:
        if self.position_embedding_type == "rope":
            turned = int(self.kv_channels * self.rotary_percent)
            if self.rotary_percent == 1.0 and turned % 2:
                raise ValueError(f"kv_channels ({self.kv_channels}) must be even: rope turns pairs of channels")
            if turned % 2 or turned == 0:
                raise ValueError(
                    f"rotary_percent ({self.rotary_percent}) of kv_channels ({self.kv_channels}) must be even, above 0"
                )
        if self.position_embedding_type != "rope" and self.rope_scaling is not None:
            raise ValueError(
                f"rope_scaling has no effect with position_embedding_type {self.position_embedding_type}; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _experts_fit(self) -> GPTArchitecture:
        if self.num_moe_experts is None:
            for name in ("moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} has no effect without num_moe_experts; leave it out")
            return self
        if self.moe_router_topk > self.num_moe_experts:
            raise ValueError(
                f"moe_router_topk ({self.moe_router_topk}) must not be above num_moe_experts ({self.num_moe_experts})"
            )
        if self.moe_router_topk == 1 and not self.moe_router_pre_softmax:
            raise ValueError(
                "moe_router_topk 1 needs moe_router_pre_softmax: the weight of a single expert is always 1"
            )
        if self.add_bias_linear:
            raise ValueError("add_bias_linear is not possible with num_moe_experts")
        return self

    @property
    def mlp_width_field(self) -> str:
        """The field that `mlp_width` is the value of."""
        return "ffn_hidden_size" if self.moe_ffn_hidden_size is None else "moe_ffn_hidden_size"

    @property
    def mlp_width(self) -> int:
        """Width of an MLP, an expert's where there are experts."""
        return self.moe_ffn_hidden_size or self.ffn_hidden_size

    @property
    def mlps_per_token(self) -> int:
        """MLPs of a layer that a token goes through."""
        return 1 if self.num_moe_experts is None else self.moe_router_topk
