"""What a model family's table is made of: rows for weights, keys for config.json."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megakd.config.architecture import GPTArchitecture
from megakd.convert.mappings import Shape, WeightMapping
from megakd.parameters.sharding import expert_of, layer_of

Value = int | float | bool | str | None


@dataclass(frozen=True)
class Row:
    """One parameter and the Hugging Face weights it is made of; `{i}` stands for the layer, `{e}` for the expert."""

    canonical_pattern: str
    hf_patterns: tuple[str, ...]
    mapping: WeightMapping

    def hf_names(self, name: str) -> tuple[str, ...]:
        """Names of the weights of the parameter of this name, in its layer and expert."""
        layer, expert = str(layer_of(name)), str(expert_of(name))
        return tuple(pattern.replace("{i}", layer).replace("{e}", expert) for pattern in self.hf_patterns)


@dataclass(frozen=True)
class ConfigKey:
    """The keys of config.json that hold one field of the architecture; several must hold the same value.

    Args:
        aliases: other spellings of the key, read where it is absent.
        writes_aliases: they are written beside it, where no spelling is read by both versions of transformers.
        default: the family's own for an absent key, possibly computed from the fields before it; None where a model
            without it cannot be read.
        null: an explicit null says something, which is what GPTArchitecture takes for a field not given; otherwise it
            is as if the key were absent.
        words: config.json's value for each value of the field, where they differ.
    """

    names: tuple[str, ...]
    default: Value | Callable[[Mapping[str, Any]], Value] = None
    null: bool = False
    words: Mapping[Any, Value] | None = None
    aliases: tuple[str, ...] = ()
    writes_aliases: bool = False


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture.

    Args:
        model_type: config.json's `model_type`.
        model_class: config.json's `architectures`.
        fields: architecture fields that config.json holds.
        fixed: architecture fields that every model of the family shares. Where neither `fields` nor this has
            `num_query_groups` or `kv_channels`, they follow from heads and hidden size.
        only: keys of config.json that change the computation, and values with which megatron-core computes the same; an
            absent key means the first one, which is written.
        rows: weights, one row per parameter.
        ignored: patterns of weights that hold nothing learnt.
        base_prefix: what names of weights begin with, and lack in folders saved without the output layer.
        default_theta: rope's base where config.json gives none.
        heads_divide_hidden_size: transformers refuses a config.json where hidden_size is no multiple of the heads.
    """

    model_type: str
    model_class: str
    fields: Mapping[str, ConfigKey]
    fixed: Mapping[str, object]
    only: Mapping[str, tuple[object, ...]]
    rows: tuple[Row, ...]
    ignored: tuple[str, ...] = ()
    base_prefix: str = "model."
    default_theta: float = 10000.0
    heads_divide_hidden_size: bool = False

    @property
    def base_class(self) -> str:
        """transformers' class of the model without its output layer."""
        return re.sub("(ForCausalLM|LMHeadModel)$", "Model", self.model_class)

    def is_class(self, name: object) -> bool:
        """Whether a class of config.json is the family's; early folders write LLaMA."""
        return str(name).lower() in (self.model_class.lower(), self.base_class.lower())

    def row_of(self, name: str) -> Row:
        """The row of a parameter.

        Raises:
            KeyError: the family has no such parameter.
        """
        layer, expert = layer_of(name), expert_of(name)
        pattern = name if layer is None else name.replace(f"layers.{layer}.", "layers.{i}.", 1)
        pattern = pattern if expert is None else pattern.replace(f".experts.{expert}.", ".experts.{e}.", 1)
        for row in self.rows:
            if row.canonical_pattern == pattern:
                return row
        raise KeyError(f"{self.model_type} has no parameter {name}")

    def hf_shapes(self, name: str, shape: Shape, architecture: GPTArchitecture) -> dict[str, Shape]:
        """Names and shapes of the weights of a parameter whose full shape is `shape`."""
        row = self.row_of(name)
        return dict(zip(row.hf_names(name), row.mapping.hf_shapes(shape, architecture), strict=True))

    def export(
        self, name: str, part: Tensor, architecture: GPTArchitecture, first_row: int = 0
    ) -> Iterator[tuple[str, int, Tensor]]:
        """Rows of the weights that a parameter, or a block of it from `first_row` on, makes: name, first row, rows."""
        row = self.row_of(name)
        names = row.hf_names(name)
        for index, first, rows in row.mapping.export(part, architecture, first_row):
            yield names[index], first, rows

    def ignores(self, hf_name: str) -> bool:
        """Whether a weight of the folder is passed over."""
        return any(
            re.fullmatch(re.escape(pattern).replace(r"\{i\}", r"\d+"), hf_name) is not None for pattern in self.ignored
        )
