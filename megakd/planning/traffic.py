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
    return over_links(cluster, max(0.0, inside), network, hops=members - 1)


def send(cluster: Cluster, pair: list[int], size: float) -> Transfer:
    """A message of `size` bytes from one rank to another."""
    crosses = pair[0] // cluster.ranks_per_node != pair[1] // cluster.ranks_per_node
    return over_links(cluster, 0.0 if crosses else size, size if crosses else 0.0, hops=1)


def over_links(cluster: Cluster, link: float, network: float, *, hops: int) -> Transfer:
    """What a rank sends at a time over both kinds of link, after so many hops' latency."""
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
    """The loss's collectives for one microbatch: the student's states, figures per row, the states' gradient."""
    layout, n = job.student.layout, job.micro_tokens(job.student)
    group = layout.tensor_group(cluster.ranks_per_node)
    chunks = -(-n // job.chunk)
    total = gather(cluster, group, 7 * 4 * n * layout.tp / chunks).times(chunks)
    gradient = gather(cluster, group, n * job.student.architecture.hidden_size * 4)
    total = total.plus(gradient if layout.sequence_parallel else gradient.times(2))
    if layout.sequence_parallel:
        total = total.plus(gather(cluster, group, n * job.student.architecture.hidden_size * job.student.element_size))
    return total


def states_transfer(job: Job, cluster: Cluster) -> Transfer:
    """The teacher's states of a microbatch put together by the student's tensor ranks, each of which has a stretch.

    They come as stretches from another layout, and from a sequence-parallel teacher in the same one.
    """
    teacher = job.teacher
    if teacher is None or not job.is_dense or not (job.crosses or teacher.layout.sequence_parallel):
        return NOTHING
    size = job.micro_tokens(job.student) * teacher.architecture.hidden_size * teacher.element_size
    return gather(cluster, job.student.layout.tensor_group(cluster.ranks_per_node), size)


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
