"""A model's place on the ranks: its process groups and the schedules that run it."""

from megakd.platform import build_platform

# Every module that imports megatron-core's models or schedules comes through this package first, so the CPU
# substitutes are in place before megatron-core is.
build_platform()
