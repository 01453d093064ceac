"""A Hugging Face folder into a megatron-core distributed checkpoint, piece by piece."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megakd.common.errors import UserError
from megakd.config.architecture import GPTArchitecture
from megakd.convert.checkpoint_keys import extra_state_keys, stacked_key, stacked_sizes
from megakd.convert.earlier_output import OutputKind
from megakd.convert.hf_config import read_hf_config
from megakd.convert.hf_weights import HFWeights
from megakd.convert.output_folder import TOKENIZER_FILES, OutputFolder, write_errors_told
from megakd.convert.source import dtype_word, most_used, to_dtype
from megakd.parameters.shapes import padded_vocab_size, parameter_shapes
from megakd.parameters.sharding import Block
from megakd.torch_dist import Piece, write_checkpoint
from megakd.torch_dist.reading import COMMON_FILE, METADATA_FILE, TRACKER_FILE

RELEASE = "release"
IMPORTED = OutputKind(
    "import",
    frozenset({TRACKER_FILE, "config.json", "generation_config.json"})
    | frozenset(TOKENIZER_FILES)
    | {f"{RELEASE}/{file}" for file in (METADATA_FILE, COMMON_FILE, "metadata.json", "__0_*.distcp")},
    ((TRACKER_FILE,), (f"{RELEASE}/{METADATA_FILE}",), (f"{RELEASE}/metadata.json",)),
)
_PIECE_BYTES = 8 * 2**20

Progress = Callable[[int], None]


def import_checkpoint(
    hf: str | Path,
    out: str | Path,
    *,
    tp: int = 1,
    pp: int = 1,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    begin: Callable[[int], Progress] = lambda total: lambda done: None,
) -> None:
    """Convert a Hugging Face folder to a distributed checkpoint in Megatron-LM's layout.

    The checkpoint loads under any layout. Beside it are config.json, generation_config.json and the tokenizer.

    Args:
        tp, pp: the layout it is meant for: it must be possible, and pads the vocabulary as Megatron-LM pads it there.
        dtype: type of the weights written; None keeps each as it is.
        overwrite: replace what an earlier conversion wrote to `out`.
        begin: called with the number of bytes to be written; what it returns is called with the bytes of each piece.

    Raises:
        UserError: the folder is not a model that can be read, the layout is not possible for it, `out` exists or
            cannot be written. `out` is then as it was.
    """
    with write_errors_told(out):
        folder = OutputFolder(out, IMPORTED, hf, overwrite=overwrite)
    with folder, HFWeights(hf) as source:
        source.check(source.architecture)
        _check_layout(source.architecture, tp, pp, source.path)
        if dtype is None:
            _check_types(source)
        pieces = list(_pieces(source, 128 * tp, dtype))
        total = sum(piece.nbytes for piece in pieces)
        objects = {key: [None] for key in extra_state_keys(source.architecture)}
        folder.check_space(total, len(pieces) + len(objects), source.path)
        params_dtype = most_used((piece.dtype, piece.nbytes) for piece in pieces)
        common = {
            "args": _megatron_lm_arguments(source.architecture, tp, pp, params_dtype),
            "checkpoint_version": 3.0,
            "iteration": 0,
        }
        with write_errors_told(out):
            release = folder.path / RELEASE
            release.mkdir()
            write_checkpoint(release, pieces, objects, common, begin(total))
            (folder.path / TRACKER_FILE).write_text(RELEASE, encoding="utf-8")
            _copy_beside(source.path, folder, dtype)
            folder.publish()


def _check_layout(architecture: GPTArchitecture, tp: int, pp: int, path: Path) -> None:
    for name, value, divides in (
        ("num_query_groups", architecture.num_query_groups, tp),
        (architecture.mlp_width_field, architecture.mlp_width, tp),
    ):
        if value % divides:
            raise UserError(f"--tp is {tp}; it must divide {name} ({value}) of {path}.")
    if pp > architecture.num_layers:
        raise UserError(f"--pp is {pp}; it must not be above the {architecture.num_layers} layers of {path}.")


def blocks_of(shape: tuple[int, ...], row_step: int, dtype: torch.dtype) -> Iterator[Block]:
    """A parameter in blocks of whole rows, not much larger than is handled at a time."""
    steps = shape[0] // row_step
    count = math.ceil(math.prod(shape) * dtype.itemsize / _PIECE_BYTES)
    # An even number of equal blocks: none holds rows of both gate and up, which would have to be put together.
    rows = math.ceil(steps / (count + count % 2 if count > 1 else 1)) * row_step
    for start in range(0, shape[0], rows):
        yield (slice(start, min(start + rows, shape[0])),)


def _pieces(source: HFWeights, divisible_by: int, dtype: torch.dtype | None) -> Iterator[Piece]:
    for name, shape in parameter_shapes(source.architecture, divisible_by).items():
        written_as = dtype or source.dtype(name)
        key, place = stacked_key(name, source.architecture)
        whole = (*stacked_sizes(place, source.architecture), *shape)
        for block in blocks_of(shape, source.row_step(name), written_as):
            rows = block[0]
            sizes = (*(1 for _ in place), rows.stop - rows.start, *shape[1:])
            offsets = (*place, rows.start, *(0 for _ in shape[1:]))
            yield Piece(key, whole, offsets, sizes, written_as, partial(_read, source, name, block, written_as, sizes))


def _check_types(source: HFWeights) -> None:
    """Refuse weights that would have to change their type: a kind of weight of all layers is one tensor there."""
    first: dict[str, tuple[str, torch.dtype]] = {}
    for name in parameter_shapes(source.architecture, 1):
        key, _ = stacked_key(name, source.architecture)
        for weight, dtype in source.dtypes(name).items():
            other, expected = first.setdefault(key, (weight, dtype))
            if dtype is not expected:
                raise UserError(
                    f"{other} in {source.path} is stored as {dtype_word(expected)} and {weight} as "
                    f"{dtype_word(dtype)}; a Megatron checkpoint holds both in one tensor ({key}). Give --dtype to "
                    "write all weights as one type."
                )


def _read(source: HFWeights, name: str, block: Block, dtype: torch.dtype, sizes: tuple[int, ...]) -> Tensor:
    part = to_dtype(source.read(name, block), dtype, source.origin(name))
    return _of_its_own(part.contiguous()).view(sizes)


def _of_its_own(tensor: Tensor) -> Tensor:
    """The same memory as the whole of a storage: torch's checkpoint writer copies a tensor that is part of one."""
    return torch.from_numpy(tensor.view(-1).view(torch.uint8).numpy()).view(tensor.dtype)


def _megatron_lm_arguments(architecture: GPTArchitecture, tp: int, pp: int, dtype: torch.dtype) -> argparse.Namespace:
    """The model's shape in the words of Megatron-LM's command line, which it reads with --use-checkpoint-args."""
    a = architecture
    return argparse.Namespace(
        num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        ffn_hidden_size=a.ffn_hidden_size,
        num_attention_heads=a.num_attention_heads,
        group_query_attention=a.num_query_groups != a.num_attention_heads,
        num_query_groups=a.num_query_groups,
        kv_channels=a.kv_channels,
        seq_length=a.max_position_embeddings,
        max_position_embeddings=a.max_position_embeddings,
        position_embedding_type=a.position_embedding_type,
        rotary_base=int(a.rotary_base) if a.rotary_base == int(a.rotary_base) else a.rotary_base,
        rotary_percent=a.rotary_percent,
        use_rope_scaling=a.rope_scaling is not None,
        # Its default where there is no scaling.
        rope_scaling_factor=8.0 if a.rope_scaling is None else a.rope_scaling.factor,
        normalization=a.normalization,
        norm_epsilon=a.layernorm_epsilon,
        swiglu=a.activation == "swiglu",
        squared_relu=False,
        quick_geglu=False,
        # Of models of megatron-core's, openai_gelu is not read: GELU is the tanh approximation where it is fused.
        openai_gelu=False,
        bias_gelu_fusion=a.activation == "gelu_tanh",
        add_bias_linear=a.add_bias_linear,
        add_qkv_bias=a.add_qkv_bias,
        qk_layernorm=a.qk_layernorm,
        num_experts=a.num_moe_experts,
        moe_ffn_hidden_size=None if a.num_moe_experts is None else a.mlp_width,
        moe_router_topk=a.moe_router_topk,
        moe_router_pre_softmax=a.moe_router_pre_softmax,
        window_size=None if a.sliding_window is None else (a.sliding_window - 1, 0),
        untie_embeddings_and_output_weights=not a.share_embeddings_and_output_weights,
        make_vocab_size_divisible_by=128,
        padded_vocab_size=padded_vocab_size(a.vocab_size, 128 * tp),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        tokenizer_type="HuggingFaceTokenizer",
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        params_dtype=dtype,
    )


def _copy_beside(source: Path, folder: OutputFolder, dtype: torch.dtype | None) -> None:
    config = read_hf_config(source)
    # The code that it names is left behind.
    config.pop("auto_map", None)
    if dtype is not None:
        config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    (folder.path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder.path / "generation_config.json")
    folder.copy_tokenizer(source)
