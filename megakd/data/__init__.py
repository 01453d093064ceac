"""Token files, tokenizers, samples and microbatches."""

from megakd.platform import silence_megatron

silence_megatron()  # before indexed.py imports megatron-core, in processes that never build a platform too
