"""The way of a teacher's hidden states to the student's last stage: who sends what to whom, as in the run."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import lru_cache

from megakd.parallel.pieces import Spread, Window, last_stage_spread, plan_pieces
from megakd.planning.clusters import Cluster
from megakd.planning.job import Job, Model
from megakd.planning.traffic import NOTHING, Transfer, over_links, slowest

_Pairs = dict[tuple[int, int], float]


def crossing_transfer(job: Job, cluster: Cluster) -> Transfer:
    """A window's hidden states from the teacher's last stage to the student's: every state once.

    What the rank that sends most sends, each message over the kind of link that is between its two ranks. The time is
    that of the busiest rank of either side, as one that receives from several is no faster.
    """
    if job.teacher is None or not job.crosses:
        return NOTHING
    pairs, width = _tokens(job), job.teacher.architecture.hidden_size * job.teacher.element_size
    sides = [_by_rank(pairs, end, width, cluster) for end in (0, 1)]
    sent, received = (slowest(side) if side else NOTHING for side in sides)
    return Transfer(sent.link_bytes, sent.network_bytes, sent.calls, max(sent.seconds, received.seconds))


def sent_tokens(job: Job) -> float:
    """Tokens of a window whose states the teacher's busiest rank sends."""
    sent: dict[int, float] = defaultdict(float)
    for (source, _), tokens in _tokens(job).items():
        sent[source] += tokens
    return max(sent.values(), default=0.0)


def _by_rank(pairs: _Pairs, end: int, width: int, cluster: Cluster) -> list[Transfer]:
    """What each rank at one end of the pairs has to do with, its messages under way together."""
    ends: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for pair, tokens in pairs.items():
        nodes = [rank // cluster.ranks_per_node for rank in pair]
        size = tokens * width
        ends[pair[end]].append((size, 0.0) if nodes[0] == nodes[1] else (0.0, size))
    transfers = []
    for sizes in ends.values():
        link, network = (sum(kind) for kind in zip(*sizes, strict=True))
        together = over_links(cluster, link, network, hops=1)
        transfers.append(Transfer(link, network, len(sizes), together.seconds))
    return transfers


def _tokens(job: Job) -> _Pairs:
    """Tokens of a window by the rank that sends their states and the one that receives them."""
    assert job.teacher is not None
    source = _spread(job.teacher, is_cut=job.teacher.layout.sequence_parallel)
    # Each of the student's tensor ranks receives a stretch of the sequence.
    target = _spread(job.student, is_cut=True)
    samples = job.window_microbatches * job.student.micro_batch_size * job.student.layout.dp
    return _tokens_between(source, target, samples, job.sequence_length)


def _spread(model: Model, *, is_cut: bool) -> Spread:
    layout = model.layout
    return last_stage_spread(
        layout.ranks, tp_size=layout.tp, pp_size=layout.pp, micro_batch_size=model.micro_batch_size, is_cut=is_cut
    )


@lru_cache(maxsize=256)
def _tokens_between(source: Spread, target: Spread, samples: int, length: int) -> _Pairs:
    """As `_tokens`, from as many samples as come round again: a window is a multiple of both models' microbatches."""
    period = math.lcm(*(len(spread.ranks) * spread.micro_batch_size for spread in (source, target)))
    pairs: _Pairs = defaultdict(float)
    for piece in plan_pieces(source, target, Window(period, length, one_row=False)):
        if piece.source.rank != piece.target.rank:
            pairs[piece.source.rank, piece.target.rank] += piece.length * samples / period
    return dict(pairs)
