"""Distillation losses over a vocabulary that is spread over tensor-parallel ranks; no megatron-core in here."""

from megakd.losses.chunking import chunk_rows
from megakd.losses.distillation import distillation_loss
from megakd.losses.signals import DenseSignal, LossSums, SparseSignal, TokenStatistics
from megakd.losses.token_statistics import token_statistics

__all__ = [
    "DenseSignal",
    "LossSums",
    "SparseSignal",
    "TokenStatistics",
    "chunk_rows",
    "distillation_loss",
    "token_statistics",
]
