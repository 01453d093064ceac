"""Distributed checkpoints of a run."""

from megakd.platform import prepare_megatron

prepare_megatron()
