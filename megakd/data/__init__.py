"""Token files, the samples cut from them, and the batches every rank reads."""

from megakd.platform import prepare_megatron

prepare_megatron()
