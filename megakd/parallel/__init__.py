"""A model's place on the ranks: its process groups and the schedules that run it."""

from megakd.platform import prepare_megatron

prepare_megatron()
