"""Held-out cross-entropy, perplexity, divergence from the teacher and top-1 agreement."""

from megakd.evaluation.evaluate import Scores, evaluate

__all__ = ["Scores", "evaluate"]
