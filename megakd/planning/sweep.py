"""All layouts of a run on a cluster that its rules and memory allow, the fastest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from megakd.common.errors import UserError
from megakd.config.layouts import student_ranks, teacher_is_dedicated, teacher_ranks
from megakd.config.schema import Config
from megakd.config.teacher_checks import check_dedicated_ranks, check_teacher_placement
from megakd.planning.clusters import Cluster
from megakd.planning.job import build_job, layout_settings, with_settings
from megakd.planning.plan import Plan, usable_bytes
from megakd.planning.splits import Split, possible_splits
from megakd.planning.teacher_memory import teacher_memory
from megakd.planning.timing import teacher_side_seconds
from megakd.planning.variants import best_variant, could_fit
from megakd.training.architectures import student_architecture

# Layouts of the teacher alone that are planned in full for one of the student's, the fastest.
_OWN_LAYOUTS = 3


@dataclass(frozen=True)
class Candidate:
    """A layout with the variant of it that is fastest of those that fit.

    Attributes:
        teacher_settings: its layout where that is its own, its window and its place.
    """

    plan: Plan
    split: Split
    recompute: str
    teacher_settings: dict[str, object] = field(default_factory=dict)

    def settings(self) -> dict[str, object]:
        """What to set for it."""
        layout = self.plan.job.student.layout
        return {
            **layout_settings("parallel", layout.tp, layout.pp, sequence_parallel=layout.sequence_parallel),
            **self.split.settings(),
            "student.recompute_granularity": self.recompute,
            **self.teacher_settings,
        }


def sweep(config: Config, world_size: int, cluster: Cluster) -> tuple[list[Candidate], dict[str, str]]:
    """Candidates, those that fit before those that do not, by their step's time; and why the others are none.

    Teacher and student share the layout but for what teacher.parallel sets; where they do not fit together, layouts of
    the teacher alone are tried. On ranks of its own, whose number is the configuration's, the teacher has its best
    layout for each of the student's. Tensor ranks stay within a node. The batch sizes are the configuration's.

    Raises:
        UserError: no ranks are left to the student.
    """
    candidates, refused = [], {}
    check_teacher_placement(config)
    check_dedicated_ranks(config, world_size)
    students = student_ranks(config, world_size)
    for tp in _divisors(cluster.ranks_per_node):
        for pp in _divisors(students // tp if students % tp == 0 else 0):
            try:
                candidates.append(_candidate(config, world_size, cluster, tp, pp))
            except UserError as error:
                refused[f"TP {tp} x PP {pp}"] = str(error)
    candidates.sort(key=_rank)
    return candidates, refused


def _rank(candidate: Candidate) -> tuple[bool, float, float]:
    """Those that fit come first, by the step's time; where a teacher of its own sets that, by the student's."""
    return *candidate.plan.preference, candidate.plan.timing.student_side


def _candidate(config: Config, world_size: int, cluster: Cluster, tp: int, pp: int) -> Candidate:
    """Raises UserError where a rule forbids the layout."""
    num_layers = student_architecture(config).num_layers
    some = next(possible_splits(num_layers, pp), None)
    if some is None:
        raise UserError(f"the student's {num_layers} layers do not spread over {pp} stages.")
    config = with_settings(
        config,
        {**layout_settings("parallel", tp, pp, sequence_parallel=tp > 1), **some.settings()},
    )
    if teacher_is_dedicated(config):
        of_teacher = _best_teacher(config, world_size, cluster)
        return _best_candidate(with_settings(config, of_teacher), world_size, cluster, of_teacher)
    common = _best_candidate(config, world_size, cluster, {})
    if common.plan.fits or common.plan.job.teacher is None:
        return common
    own = _layouts_of_its_own(config, world_size, cluster)
    return min(
        [common, *(_best_candidate(with_settings(config, of), world_size, cluster, of) for of in own)], key=_rank
    )


def _layouts_of_its_own(config: Config, world_size: int, cluster: Cluster) -> list[dict[str, object]]:
    """Settings of the fastest layouts of a teacher on the student's ranks with which a run could fit."""
    found = []
    for settings in _teacher_settings(config, world_size, cluster):
        changed = with_settings(config, settings)
        try:
            if could_fit(changed, world_size, cluster):
                seconds = teacher_side_seconds(build_job(changed, world_size, cluster.device_type), cluster)
                found.append((seconds, settings))
        except UserError:
            continue
    return [settings for _, settings in sorted(found, key=lambda pair: pair[0])[:_OWN_LAYOUTS]]


def _best_candidate(config: Config, world_size: int, cluster: Cluster, of_teacher: dict[str, object]) -> Candidate:
    best = best_variant(config, world_size, cluster)
    return Candidate(best.plan, best.split, best.recompute, of_teacher | best.teacher_settings)


def _best_teacher(config: Config, world_size: int, cluster: Cluster) -> dict[str, object]:
    """Settings of the fastest layout of a teacher's own ranks that fits them; of the leanest one where none does.

    Raises:
        UserError: of the first layout, where a rule forbids each.
    """
    capacity, errors = usable_bytes(cluster), []
    found: list[tuple[tuple[bool, float], dict[str, object]]] = []
    for settings in _teacher_settings(config, teacher_ranks(config, world_size), cluster):
        try:
            job = build_job(with_settings(config, settings), world_size, cluster.device_type)
        except UserError as error:
            errors.append(error)
            continue
        peak = max(stage.peak for stage in teacher_memory(job))
        seconds = teacher_side_seconds(job, cluster)
        found.append(((peak > capacity, seconds if peak <= capacity else peak), settings))
    if not found:
        raise errors[0]
    return min(found, key=lambda pair: pair[0])[1]


def _teacher_settings(config: Config, ranks: int, cluster: Cluster) -> Iterator[dict[str, object]]:
    """Layouts of a teacher's own ranks; what the configuration sets is kept."""
    assert config.teacher is not None
    own, section = config.teacher.parallel, "teacher.parallel"
    fixed_tp, fixed_pp = own.tensor_model_parallel_size, own.pipeline_model_parallel_size
    for tp in _divisors(cluster.ranks_per_node) if fixed_tp is None else [fixed_tp]:
        for pp in _divisors(ranks // tp if ranks % tp == 0 else 0) if fixed_pp is None else [fixed_pp]:
            is_cut = tp > 1 if own.sequence_parallel is None else own.sequence_parallel
            yield layout_settings(section, tp, pp, sequence_parallel=is_cut)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
