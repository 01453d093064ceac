"""The training samples a configuration names, and their order."""

from __future__ import annotations

from megakd.config.schema import Config
from megakd.data.indexed import TokenStream
from megakd.data.samples import SampleOrder, TokenSamples, split_samples


def open_train_samples(config: Config) -> TokenSamples:
    """Samples of data.train, without the held-out tail where `data.valid_fraction` asks for one."""
    data = config.data
    samples = TokenSamples(TokenStream(data.train), data.sequence_length)
    if data.valid_fraction is None:
        return samples
    kept, _ = split_samples(samples.num_samples, data.valid_fraction)
    return TokenSamples(TokenStream(data.train), data.sequence_length, first=kept.start, last=kept.stop)


def open_held_out_samples(config: Config) -> TokenSamples:
    """Samples of data.valid, or the tail of data.train that `data.valid_fraction` holds out."""
    data = config.data
    if data.valid is not None:
        return TokenSamples(TokenStream(data.valid), data.sequence_length)
    assert data.valid_fraction is not None
    samples = TokenSamples(TokenStream(data.train), data.sequence_length)
    _, held_out = split_samples(samples.num_samples, data.valid_fraction)
    return TokenSamples(TokenStream(data.train), data.sequence_length, first=held_out.start, last=held_out.stop)


def sample_order(config: Config, num_samples: int) -> SampleOrder:
    """The order of training samples: of (run.seed, epoch) alone."""
    return SampleOrder(num_samples, config.run.seed)
