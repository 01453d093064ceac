"""Distributed checkpoints of a run."""

from megakd.checkpoint.run_state import checkpoint_steps, latest_checkpoint, load_checkpoint, save_checkpoint

__all__ = ["checkpoint_steps", "latest_checkpoint", "load_checkpoint", "save_checkpoint"]
