"""torch's distributed checkpoints (megatron-core's `torch_dist` format): read safely, written tensor by tensor."""

from megakd.torch_dist.reading import TorchDistFolder, check_pickles, checkpoint_folder
from megakd.torch_dist.writing import Piece, write_checkpoint

__all__ = ["Piece", "TorchDistFolder", "check_pickles", "checkpoint_folder", "write_checkpoint"]
