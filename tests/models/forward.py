"""Full logits of a model under a layout, inside a gloo worker."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.config.architecture import GPTArchitecture


def full_logits(
    architecture: GPTArchitecture,
    path: str | None,
    tokens: Tensor | list[dict[str, Tensor]],
    *,
    tp: int,
    pp: int,
    sequence_parallel: bool = False,
    first_stage: int | None = None,
    seed: int | None = None,
) -> Tensor:
    """Logits [b, s, v] on every rank, from a Hugging Face folder or from a seed.

    Args:
        tokens: [b, s], or microbatches of one shape as training has them.
    """
    from megakd.convert import load_weights
    from megakd.models.gpt import build_gpt
    from megakd.models.microbatch import run_stage
    from megakd.models.parameters import canonical_parameters
    from megakd.parallel.mesh import GroupPool, build_model_mesh
    from megakd.parallel.pipeline import run_pipeline
    from megakd.parallel.random_state import seed_megatron

    mesh = build_model_mesh(GroupPool(), tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    seed_megatron(1, mesh)
    model = build_gpt(
        architecture, mesh, dtype=torch.float32, layer_spec="local", sequence_parallel=sequence_parallel,
        num_layers_in_first_pipeline_stage=first_stage, seed=seed,
    )  # fmt: skip
    if path is not None:
        load_weights(
            canonical_parameters(model).items(), path, architecture, tp_rank=mesh.tp_rank, tp_size=mesh.tp_size
        )

    def forward_step(microbatches, stage):
        batch = next(microbatches)

        def logits(hidden_and_head, non_loss_data):
            hidden, head = hidden_and_head
            if sequence_parallel and tp > 1:
                parts = [torch.empty_like(hidden) for _ in range(tp)]
                dist.all_gather(parts, hidden.contiguous(), group=mesh.groups.tp)
                hidden = torch.cat(parts)
            mine = (hidden @ head.t()).contiguous()
            shards = [torch.empty_like(mine) for _ in range(tp)]
            dist.all_gather(shards, mine, group=mesh.groups.tp)
            return torch.cat(shards, -1).transpose(0, 1)[..., : architecture.vocab_size].contiguous()

        return run_stage(stage, batch), logits

    if isinstance(tokens, Tensor):
        positions = torch.arange(tokens.shape[1])[None]
        tokens = [{"tokens": row, "position_ids": positions} for row in tokens.split(1)]
    rows, length = tokens[0]["tokens"].shape
    with torch.no_grad():
        outputs = run_pipeline(
            mesh, model.eval(), forward_step, tokens, num_microbatches=len(tokens), micro_batch_size=rows,
            sequence_length=length, forward_only=True,
        )  # fmt: skip
    result = torch.cat(outputs) if outputs else torch.empty(rows * len(tokens), length, architecture.vocab_size)
    if pp > 1:
        dist.broadcast(result, src=mesh.last_stage_rank, group=mesh.groups.pp)
    return result
