"""A Hugging Face folder against a Megatron checkpoint: every weight bit for bit, then the logits of both."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megakd.common.errors import UserError
from megakd.config.architecture import GPTArchitecture
from megakd.convert.hf_config import read_hf_config
from megakd.convert.hf_weights import HFWeights
from megakd.convert.importing import Progress, blocks_of
from megakd.convert.megatron_weights import MegatronWeights
from megakd.convert.safetensors_folder import SafetensorsFolder
from megakd.parameters.shapes import parameter_shapes

_SEQUENCES, _LENGTH = 2, 256
# A window up to here is exceeded: logits, and the attention of one layer at a time, stay small beside the models.
_SMALL_WINDOW = 1024
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@dataclass
class WeightDifference:
    """How a parameter differs. `largest` is the largest absolute difference of values; NaN counts as infinite.

    Where it is `retyped`, stored as another type on either side, values are compared, not bits. `not_finite` counts
    values that are NaN or infinite, in the Hugging Face folder and in the checkpoint.
    """

    name: str
    elements: int
    different: int = 0
    largest: float = 0.0
    retyped: bool = False
    not_finite: tuple[int, int] = (0, 0)

    def add(self, one: Tensor, other: Tensor) -> None:
        """Count a block of both."""
        hf, megatron = (int((~block.isfinite()).sum()) for block in (one, other))
        self.not_finite = (self.not_finite[0] + hf, self.not_finite[1] + megatron)
        if one.dtype is other.dtype:
            bits = _BITS[one.itemsize]
            if torch.equal(one.contiguous().view(bits), other.contiguous().view(bits)):
                return
            unequal = one.contiguous().view(bits) != other.contiguous().view(bits)
        else:
            self.retyped = True
            unequal = (one.double() != other.double()) & ~(one.isnan() & other.isnan())
        self.different += int(unequal.sum())
        if bool(unequal.any()):
            distance = (one.double() - other.double())[unequal].abs().nan_to_num(nan=torch.inf)
            self.largest = max(self.largest, float(distance.max()))


def compare_weights(hf: HFWeights, megatron: MegatronWeights, done: Progress) -> list[WeightDifference]:
    """Every parameter of both, the most different first."""
    differences = []
    for name, shape in parameter_shapes(hf.architecture, divisible_by=1).items():
        difference = WeightDifference(name, torch.Size(shape).numel())
        for block in blocks_of(shape, hf.row_step(name), hf.dtype(name)):
            mine = hf.read(name, block)
            difference.add(mine, megatron.read(name, block))
            done(mine.nbytes)
        differences.append(difference)
    return sorted(differences, key=lambda d: (d.largest, d.different), reverse=True)


def stored_bytes(hf: HFWeights) -> int:
    """Bytes that comparing reads of the folder."""
    shapes = parameter_shapes(hf.architecture, divisible_by=1)
    return sum(torch.Size(shape).numel() * hf.dtype(name).itemsize for name, shape in shapes.items())


def open_both(hf: str | Path, megatron: str | Path) -> tuple[HFWeights, MegatronWeights]:
    """Both sides, whole and of one architecture.

    Raises:
        UserError: one is not whole, or they are models of different shapes.
    """
    one, other = HFWeights(hf), MegatronWeights(megatron)
    one.check(one.architecture)
    other.check(other.architecture)
    mine, theirs = one.architecture.model_dump(), other.architecture.model_dump()
    for field, value in mine.items():
        if field != "init_method_std" and theirs[field] != value:
            raise UserError(f"{field} is {value} in {hf} and {theirs[field]} in {megatron}; they are different models.")
    return one, other


def random_tokens(architecture: GPTArchitecture) -> Tensor:
    """Tokens to compare logits on, the same each time. [b, s], as long as the model's positions allow."""
    length, window = _LENGTH, architecture.sliding_window
    if window is not None and window <= _SMALL_WINDOW:
        length = max(length, window + _LENGTH // 4)
    length = min(length, architecture.max_position_embeddings)
    return torch.randint(architecture.vocab_size, (_SEQUENCES, length), generator=torch.Generator().manual_seed(0))


def describe_tokens(architecture: GPTArchitecture, tokens: Tensor) -> str:
    """How many tokens were compared, and whether a sliding window was."""
    sequences, length = tokens.shape
    window = architecture.sliding_window
    within = "" if window is None or length > window else f", within the sliding window of {window:,},"
    return f"{sequences} x {length} tokens{within}"


def logits_difference(hf: str | Path, megatron: str | Path, architecture: GPTArchitecture, tokens: Tensor) -> float:
    """Largest difference of fp32 logits: transformers' model of the folder, and megatron-core's of the checkpoint on
    one rank. Both models are held whole.

    Raises:
        UserError: transformers cannot load the folder.
    """
    expected = _transformers_logits(hf, tokens)
    return float((_megatron_logits(megatron, architecture, tokens) - expected).abs().max())


def _transformers_logits(path: str | Path, tokens: Tensor) -> Tensor:
    """[b, s, v], of what AutoModelForCausalLM.from_pretrained(path) is without code of the folder's own."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Left to itself transformers fetches the code that these keys name. The others say what is returned.
    left_out = "^_|_implementation$|^(auto_map|quantization_config|return_dict|output_.*)$"
    told = {key: value for key, value in read_hf_config(path).items() if not re.search(left_out, key)}
    with SafetensorsFolder(path) as folder:
        # Left to itself it makes up the weights that it finds under no name of theirs.
        names = {f"^{re.escape(stored)}$": name for stored, name in folder.unwrapped.items()}
    renamed: dict[str, Any] = {"key_mapping": names} if names else {}
    verbosity = logging.get_verbosity()
    # It warns, of configuration and generation both, of tokens that no logit depends on.
    logging.set_verbosity_error()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, config=AutoConfig.for_model(**told), dtype=torch.float32, attn_implementation="eager",
            local_files_only=True, use_safetensors=True, trust_remote_code=False, **renamed,
        )  # fmt: skip
        with torch.no_grad():
            logits: Tensor = model.eval()(tokens).logits.float()
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"transformers cannot load {path} ({type(error).__name__}: {reason}). Mend its files, or compare with "
            "--weights-only."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    return logits


def _megatron_logits(path: str | Path, architecture: GPTArchitecture, tokens: Tensor) -> Tensor:
    """[b, s, v]"""
    from megakd.convert.loading import load_weights
    from megakd.models.gpt import build_gpt
    from megakd.models.parameters import canonical_parameters
    from megakd.parallel.mesh import GroupPool, build_model_mesh
    from megakd.parallel.random_state import seed_megatron
    from megakd.platform import build_platform, init_distributed, shutdown_distributed

    init_distributed(build_platform())
    try:
        mesh = build_model_mesh(GroupPool())
        seed_megatron(0, mesh)
        model = build_gpt(architecture, mesh, dtype=torch.float32, layer_spec="local").eval()
        load_weights(canonical_parameters(model).items(), path, architecture, tp_rank=0, tp_size=1)
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        device = next(model.parameters()).device
        with torch.no_grad():
            hidden, head = model(tokens.to(device), positions.to(device), None)
            logits: Tensor = hidden.transpose(0, 1) @ head[: architecture.vocab_size].t()
        return logits.float().cpu()
    finally:
        shutdown_distributed()
