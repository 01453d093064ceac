"""The two pieces of megatron-core's global state that its layers cannot do without."""

from __future__ import annotations

from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megakd.parallel.mesh import ModelMesh


def seed_megatron(seed: int, mesh: ModelMesh) -> None:
    """Make the random trackers, which recomputation saves and restores, and the global memory buffer.

    Sequence-parallel layers gather their input into that buffer. Neither depends on a mesh's groups.
    """
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    model_parallel_cuda_manual_seed(seed, tp_rank=mesh.tp_rank, ep_rank=0, etp_rank=mesh.tp_rank, force_reset_rng=True)
