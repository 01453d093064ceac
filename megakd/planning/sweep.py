"""All layouts of a run on a cluster that its rules and memory allow, the fastest first."""

from __future__ import annotations

from dataclasses import dataclass

from megakd.common.errors import UserError
from megakd.config.schema import Config
from megakd.planning.clusters import Cluster
from megakd.planning.job import build_job, with_settings
from megakd.planning.plan import Plan
from megakd.planning.splits import Split, best_split, possible_splits
from megakd.training.architectures import student_architecture

_RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Candidate:
    """A layout with the least recomputation that lets it fit, and its best split."""

    plan: Plan
    split: Split
    recompute: str

    def settings(self) -> dict[str, object]:
        """What to set for it."""
        layout = self.plan.job.student.layout
        return {
            "parallel.tensor_model_parallel_size": layout.tp,
            "parallel.pipeline_model_parallel_size": layout.pp,
            "parallel.sequence_parallel": layout.sequence_parallel,
            **self.split.settings(),
            "student.recompute_granularity": self.recompute,
        }


def sweep(config: Config, world_size: int, cluster: Cluster) -> tuple[list[Candidate], dict[str, str]]:
    """Candidates, those that fit before those that do not, by their step's time; and why the others are none.

    Teacher and student share the layout but for what teacher.parallel sets. Tensor ranks stay within a node. The batch
    sizes are the configuration's.
    """
    candidates, refused = [], {}
    for tp in _divisors(cluster.ranks_per_node):
        for pp in _divisors(world_size // tp if world_size % tp == 0 else 0):
            try:
                candidates.append(_candidate(config, world_size, cluster, tp, pp))
            except UserError as error:
                refused[f"TP {tp} x PP {pp}"] = str(error)
    candidates.sort(key=lambda c: (not c.plan.fits, c.plan.timing.seconds if c.plan.fits else c.plan.peak))
    return candidates, refused


def _candidate(config: Config, world_size: int, cluster: Cluster, tp: int, pp: int) -> Candidate:
    """Raises UserError where a rule forbids the layout."""
    num_layers = student_architecture(config).num_layers
    some = next(possible_splits(num_layers, pp), None)
    if some is None:
        raise UserError(f"the student's {num_layers} layers do not spread over {pp} stages.")
    found = None
    for recompute in _RECOMPUTE:
        changed = with_settings(
            config,
            {
                "parallel.tensor_model_parallel_size": tp,
                "parallel.pipeline_model_parallel_size": pp,
                "parallel.sequence_parallel": tp > 1,
                **some.settings(),
                "student.recompute_granularity": recompute,
            },
        )
        best = best_split(build_job(changed, world_size, cluster.device_type), cluster)
        assert best is not None
        found = Candidate(best[1], best[0], recompute)
        if found.plan.fits:
            break
    assert found is not None
    return found


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
