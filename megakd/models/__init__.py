"""GPT models on megatron-core, whose last stage yields the hidden state and the head instead of logits."""

from megakd.platform import prepare_megatron

prepare_megatron()
