"""Bytes that a step moves between ranks, by what moves them and over which kind of link."""

from __future__ import annotations

from dataclasses import dataclass

from megakd.planning.clusters import Cluster
from megakd.planning.job import Job, Model
from megakd.planning.stages import stage_parameters

LINK, NETWORK = "link", "network"
_LATENCY_SECONDS = {LINK: 8e-6, NETWORK: 20e-6}


@dataclass(frozen=True)
class Transfer:
    """What one rank sends in a step for one purpose.

    Attributes:
        link_bytes, network_bytes: over links within its node, and over its share of the network.
        calls: collectives or messages.
        seconds: how long they take one after the other.
    """

    link_bytes: float = 0.0
    network_bytes: float = 0.0
    calls: float = 0.0
    seconds: float = 0.0

    def times(self, count: float) -> Transfer:
        """So many of them."""
        return Transfer(self.link_bytes * count, self.network_bytes * count, self.calls * count, self.seconds * count)

    def plus(self, other: Transfer) -> Transfer:
        """Both, one after the other."""
        return Transfer(
            self.link_bytes + other.link_bytes, self.network_bytes + other.network_bytes, self.calls + other.calls,
            self.seconds + other.seconds,
        )  # fmt: skip


NOTHING = Transfer()


def slowest(transfers: list[Transfer]) -> Transfer:
    """The one that takes longest: all wait for it."""
    return max(transfers, key=lambda transfer: transfer.seconds)


def gather(cluster: Cluster, group: list[int], size: float) -> Transfer:
    """An all-gather to, or a reduce-scatter from, `size` bytes on every rank of a group; an all-reduce is two.

    A ring within each node and one over the nodes for each of a node's members, as NCCL's rings use all cards.
    """
    nodes = len({rank // cluster.ranks_per_node for rank in group})
    members = len(group)
    if members == 1:
        return NOTHING
    local = max(1, members // nodes)
    network = size / local * (nodes - 1) / nodes if nodes > 1 else 0.0
    inside = size * (members - 1) / members - network
    return _over(cluster, max(0.0, inside), network, hops=members - 1)


def send(cluster: Cluster, pair: list[int], size: float) -> Transfer:
    """A message of `size` bytes from one rank to another."""
    crosses = pair[0] // cluster.ranks_per_node != pair[1] // cluster.ranks_per_node
    return _over(cluster, 0.0 if crosses else size, size if crosses else 0.0, hops=1)


def _over(cluster: Cluster, link: float, network: float, hops: int) -> Transfer:
    rate = cluster.transfer_efficiency * 1e9
    seconds = max(link / (cluster.link_gb_per_s * rate), network / (cluster.network_gb_per_s * rate))
    kind = NETWORK if network else LINK
    return Transfer(link, network, 1, seconds + hops * _LATENCY_SECONDS[kind])


def layer_transfer(job: Job, model: Model, cluster: Cluster, *, backward: bool) -> Transfer:
    """A layer's tensor-parallel collectives for one microbatch in one direction.

    Attention and MLP each put the sequence together and spread it again, or add up a whole one, which is as much.
    Under sequence parallelism backward puts it together once more, for the weights' gradients.
    """
    size = job.micro_tokens(model) * model.architecture.hidden_size * model.element_size
    rounds = 6 if backward and model.layout.sequence_parallel else 4
    return gather(cluster, model.layout.tensor_group(cluster.ranks_per_node), size).times(rounds)


def embedding_transfer(job: Job, model: Model, cluster: Cluster, *, backward: bool) -> Transfer:
    """The first stage's embedding, of which every tensor rank holds a part, for one microbatch in one direction."""
    size = job.micro_tokens(model) * model.architecture.hidden_size * model.element_size
    once = gather(cluster, model.layout.tensor_group(cluster.ranks_per_node), size)
    if model.layout.sequence_parallel:
        return once
    return NOTHING if backward else once.times(2)


def boundary_transfer(job: Job, model: Model, cluster: Cluster, stage: int) -> Transfer:
    """A microbatch's activations, or their gradients, from a stage to its neighbour."""
    size = job.micro_tokens(model) * model.architecture.hidden_size * model.element_size / model.layout.sequence_shards
    return slowest([send(cluster, pair, size) for pair in model.layout.boundaries(stage)])


def loss_transfer(job: Job, cluster: Cluster) -> Transfer:
    """The loss's collectives for one microbatch: hidden states, figures per row, the hidden state's gradient."""
    layout, n = job.student.layout, job.micro_tokens(job.student)
    group = layout.tensor_group(cluster.ranks_per_node)
    chunks = -(-n // job.chunk)
    total = gather(cluster, group, 7 * 4 * n * layout.tp / chunks).times(chunks)
    gradient = gather(cluster, group, n * job.student.architecture.hidden_size * 4)
    total = total.plus(gradient if layout.sequence_parallel else gradient.times(2))
    for model in (job.student, job.teacher if job.is_dense else None):
        if model is not None and (model.layout.sequence_parallel or (model is job.teacher and job.crosses)):
            total = total.plus(gather(cluster, group, n * model.architecture.hidden_size * model.element_size))
    return total


def crossing_transfer(job: Job, cluster: Cluster) -> Transfer:
    """A window's hidden states from the teacher's last stage to the student's: every state once.

    The rank that sends most; over the network where the two stages do not share their nodes.
    """
    if job.teacher is None or not job.crosses:
        return NOTHING
    teacher = job.teacher
    window = job.window_microbatches * job.micro_tokens(job.student) * job.student.layout.dp
    size = window * teacher.architecture.hidden_size * teacher.element_size / (teacher.layout.dp * teacher.layout.tp)
    ends = [model.layout.pp * model.layout.dp * model.layout.tp - 1 for model in (job.student, teacher)]
    starts = [
        end + 1 - model.layout.dp * model.layout.tp for end, model in zip(ends, (job.student, teacher), strict=True)
    ]
    nodes = [
        set(range(a // cluster.ranks_per_node, b // cluster.ranks_per_node + 1))
        for a, b in zip(starts, ends, strict=True)
    ]
    pair = [0, 0 if nodes[0] == nodes[1] else cluster.ranks_per_node]
    return send(cluster, pair, size)


def gradient_transfer(job: Job, cluster: Cluster, stage: int) -> tuple[Transfer, Transfer]:
    """Once a step: the gradients' reduction over data ranks, and the gathering of parameters that follows it."""
    layout = job.student.layout
    count = stage_parameters(job.student)[stage].count
    groups = layout.data_groups(stage)
    reduce = slowest([gather(cluster, group, 4.0 * count) for group in groups])
    collect = NOTHING
    if job.config.optimizer.use_distributed_optimizer:
        size = job.student.element_size * count
        collect = slowest([gather(cluster, group, size) for group in groups])
    else:
        reduce = reduce.times(2)
    copied = stage_parameters(job.student)[-1].copied
    if copied and stage in (0, layout.pp - 1):
        reduce = reduce.plus(gather(cluster, layout.ends(), 4.0 * copied).times(2))
    return reduce, collect
