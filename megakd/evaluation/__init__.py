"""Held-out cross-entropy, perplexity, divergence from the teacher and top-1 agreement."""

from megakd.evaluation.evaluate import EVALUATION_WINDOW, Scores, evaluate

__all__ = ["EVALUATION_WINDOW", "Scores", "evaluate"]
