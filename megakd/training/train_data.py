"""The data sets a configuration names, opened: training samples with their order, and held-out samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megakd.common.errors import UserError
from megakd.config.schema import Config, DataSource
from megakd.data.examples import Examples, ExampleSamples
from megakd.data.fingerprint import read_metadata
from megakd.data.indexed import MASK_ENDING, TokenStream
from megakd.data.known_ids import CheckedSamples
from megakd.data.order import SampleOrder, Share, shares_by_epochs, shares_by_weight
from megakd.data.samples import Blend, Samples, Split, TokenSamples, split_items
from megakd.training.architectures import embedding_rows
from megakd.training.schedule import total_steps

Purpose = Literal["train", "valid", "test"]


@dataclass(frozen=True)
class DataPart:
    """A data set's samples for a purpose: `ids` are theirs within it."""

    source: DataSource
    of_examples: bool
    samples: Samples
    ids: range
    lines: list[str]


@dataclass(frozen=True)
class TrainData:
    """Samples to train on, the data sets they are of, the order in which they come, and lines that tell what was made
    of the files.
    """

    samples: Blend
    parts: Sequence[DataPart]
    order: SampleOrder
    lines: list[str]


@dataclass(frozen=True)
class HeldOutData:
    """Samples to measure on, the ids of those that are meant, [n], and lines that tell what was made of the files."""

    samples: Samples
    ids: NDArray[np.int64]
    lines: list[str]


def open_train_data(config: Config) -> TrainData:
    """Open `data.train`, without what is held out of it.

    Raises:
        UserError: a file is missing or damaged, or a setting has no effect on this kind of data.
    """
    sources = config.data.train
    kinds = {is_examples(source.path, "data.train") for source in sources}
    check_effects(config, kinds)
    parts = [_open(config, source, "data.train", "train") for source in sources]
    blend = Blend([part.samples for part in parts])
    ids = [blend.ids(number, part.ids) for number, part in enumerate(parts)]
    if sources[0].weight is not None:
        shares = shares_by_weight(ids, [source.weight or 0.0 for source in sources])
    else:
        shares = shares_by_epochs(ids, [1.0 if source.epochs is None else source.epochs for source in sources])
    order = SampleOrder(shares, config.run.seed)
    lines = [line for part in parts for line in part.lines]
    if len(shares) > 1 or shares[0].epochs != 1:
        lines += list(_describe_shares(sources, shares, order.num_samples))
    return TrainData(blend, parts, order, lines)


def run_steps(config: Config, data: TrainData) -> int:
    """Optimizer steps of the run."""
    return total_steps(
        config.schedule,
        samples=data.order.num_samples,
        sequence_length=config.data.sequence_length,
        global_batch_size=config.data.global_batch_size,
    )


def held_out_sources(config: Config, purpose: Purpose) -> tuple[str, Sequence[DataSource]] | None:
    """The key and the data sets that samples to measure on come from; None where the configuration names none."""
    own, fraction = getattr(config.data, purpose), getattr(config.data, f"{purpose}_fraction")
    if own is not None:
        return f"data.{purpose}", own
    return ("data.train", config.data.train) if fraction is not None else None


def open_held_out_data(config: Config, purpose: Purpose) -> HeldOutData:
    """Open `data.valid` or `data.test`, or what their fractions hold out of `data.train`.

    Samples of several data sets alternate in proportion to their sizes, so that the first ones are of all of them.

    Raises:
        UserError: as open_train_data, or no such data is named.
    """
    found = held_out_sources(config, purpose)
    if found is None:
        raise UserError(
            f"evaluation.split is {purpose} and no such data is named; set data.{purpose} or data.{purpose}_fraction."
        )
    key, sources = found
    own = key == f"data.{purpose}"
    parts = [_open(config, source, key, None if own else purpose) for source in sources]
    blend = Blend([part.samples for part in parts])
    ids = [np.arange(r.start, r.stop, dtype=np.int64) for r in (blend.ids(n, p.ids) for n, p in enumerate(parts))]
    places = np.concatenate([(np.arange(len(part)) + 0.5) / len(part) for part in ids])
    lines = [line for part in parts for line in part.lines] if own else []
    return HeldOutData(blend, np.concatenate(ids)[np.argsort(places, kind="stable")], lines)


def is_examples(prefix: str, key: str) -> bool:
    """Whether a data set is of examples (chat, instructions), not of text.

    Raises:
        UserError: its description says so and the mask is missing.
    """
    metadata = read_metadata(prefix)
    has_mask = Path(f"{prefix}{MASK_ENDING}.idx").is_file()
    if metadata is not None and metadata.get("kind") == "examples" and not has_mask:
        raise UserError(
            f"{key}: {prefix} is a data set of examples and {prefix}{MASK_ENDING}.idx does not exist. Copy it too, or "
            "write the data again with tools/preprocess_data.py."
        )
    return has_mask


def check_effects(config: Config, kinds: set[bool]) -> None:
    """Refuse settings that do nothing to the kind of data there is.

    Args:
        kinds: of the training data sets, whether they are of examples.

    Raises:
        UserError: one does nothing.
    """
    data, defaults = config.data, type(config.data).model_fields
    for of_examples, word, keys in (
        (True, "examples (chat, instructions)", ("loss_on", "truncation", "packing")),
        (False, "text", ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")),
    ):
        if of_examples in kinds:
            continue
        for key in keys:
            value, default = getattr(data, key), defaults[key].default
            if value != default:
                raise UserError(
                    f"data.{key} is {str(value).lower()} and has no effect: data.train has no data set of {word}. "
                    f"Leave it out (or {str(default).lower()})."
                )


def _open(config: Config, source: DataSource, key: str, purpose: Purpose | None) -> DataPart:
    """Samples of a data set for a purpose; None for all of them."""
    data = config.data
    if not is_examples(source.path, key):
        samples = TokenSamples(
            TokenStream(source.path, key=key),
            data.sequence_length,
            reset_position_ids=data.reset_position_ids,
            reset_attention_mask=data.reset_attention_mask,
            eod_mask_loss=data.eod_mask_loss,
        )
        checked = CheckedSamples(samples, embedding_rows(config), key=key, prefix=source.path)
        return DataPart(source, False, checked, _items_for(config, purpose, samples.num_samples), [])
    examples = Examples(source.path, data.loss_on, key=key)
    packed = ExampleSamples(
        examples,
        # Before they are packed: packs stand in the order of their examples' lengths.
        _items_for(config, purpose, len(examples)),
        data.sequence_length,
        truncation=data.truncation,
        packing=data.packing,
    )
    checked = CheckedSamples(packed, embedding_rows(config), key=key, prefix=source.path)
    return DataPart(source, True, checked, range(packed.num_samples), packed.fit.describe(key, source.path))


def _items_for(config: Config, purpose: Purpose | None, count: int) -> range:
    valid, test = config.data.valid_fraction or 0.0, config.data.test_fraction or 0.0
    if purpose is None or not (valid or test):
        return range(count)
    split: Split = split_items(count, valid, test)
    return {"train": split.train, "valid": split.valid, "test": split.test}[purpose]


def _describe_shares(sources: Sequence[DataSource], shares: Sequence[Share], total: int) -> Iterator[str]:
    for source, share in zip(sources, shares, strict=True):
        yield (
            f"data.train: {source.path} is {share.count / total:.1%} of the blend: {share.count:,} of {total:,} "
            f"samples in an epoch, {share.epochs:.2f} passes over its {len(share.ids):,}"
        )
