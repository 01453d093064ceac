"""A plan of the writing of a teacher's cache: the teacher alone on all ranks, what it needs and how long it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megakd.cache.layout import ENTRY, INDEX_ENTRY_BYTES
from megakd.cache.sampled import SampledCodec
from megakd.losses.chunking import BLOCK_BYTES
from megakd.losses.sparse_targets import BLOCK_COLUMNS, SEARCHED_COLUMNS
from megakd.planning.activations import forward_bytes
from megakd.planning.clusters import Cluster
from megakd.planning.flops import teacher_flops
from megakd.planning.job import Job, Model, ids_per_token
from megakd.planning.memory import BATCH_BYTES, StageMemory
from megakd.planning.plan import ClusterPlan
from megakd.planning.stages import stage_parameters
from megakd.planning.timing import memory_seconds, product_seconds, teacher_stage_seconds
from megakd.planning.traffic import (
    NOTHING,
    Transfer,
    boundary_transfer,
    embedding_transfer,
    gather,
    layer_transfer,
    slowest,
)
from megakd.training.teacher_cache import WINDOW, cache_codec

# Elementwise passes over the logits, each reading or writing four bytes: largest, exponentials, masses in fp64.
_PASSES = 10
# Bytes of a column that draws look at: places, masses in fp64 and their sums, and what is compared.
_SEARCH_BYTES = 34


@dataclass(frozen=True)
class CachePlan(ClusterPlan):
    """Memory of each stage's ranks, and the time of a window of microbatches.

    Attributes:
        extraction: seconds of the last stage for what is kept of one microbatch.
        stage_seconds: of each stage's layers for one microbatch.
        transfers: by purpose, what the rank that sends most for it sends in a window.
    """

    memory: list[StageMemory]
    stage_flops: list[float]
    head_flops: float
    stage_seconds: list[float]
    extraction: float
    transfers: dict[str, Transfer]

    @property
    def teacher(self) -> Model:
        """The only model."""
        assert self.job.teacher is not None
        return self.job.teacher

    @property
    def peak(self) -> float:
        """Bytes of the rank that needs most."""
        return max(stage.peak for stage in self.memory)

    @property
    def window_seconds(self) -> float:
        """Of a window in a row of them: stages before the last work on the next one while that keeps what it has."""
        slowest_stage, last = max(self.stage_seconds), self.stage_seconds[-1]
        return (WINDOW - 1) * slowest_stage + max(slowest_stage, last + WINDOW * self.extraction)

    @property
    def window_tokens(self) -> int:
        """Tokens of a window over all replicas."""
        return WINDOW * self.job.micro_tokens(self.teacher) * self.teacher.layout.dp

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.window_tokens / self.window_seconds

    @property
    def mfu(self) -> float:
        """Operations of layers and head over what the ranks could do in the time."""
        needed = (sum(self.stage_flops) + self.head_flops) * WINDOW * self.teacher.layout.tp * self.teacher.layout.dp
        peak = self.cluster.tflops(self.teacher.element_size) * 1e12 * self.job.world_size
        return needed / (peak * self.window_seconds)

    @property
    def tokens(self) -> int | None:
        """Tokens of the run whose samples are written, which may visit some again; None where that is all data."""
        steps = self.job.num_steps()
        return None if steps is None or self.job.config.cache.scope != "run" else steps * self.job.step_tokens

    @property
    def bytes_per_token(self) -> float:
        """Bytes of the cache for a token of the data at the most: reached where all count, and all its draws differ."""
        codec, length = cache_codec(self.job.config), self.job.sequence_length
        row = codec.most_bytes_per_row if isinstance(codec, SampledCodec) else codec.bytes_per_row
        assert row is not None
        # A sample's entries in shard and index, which of its positions are there, streams that end at whole bytes.
        sample = ENTRY.itemsize + INDEX_ENTRY_BYTES + length / 8 + 8
        return row + sample / length

    def price(self, tokens: float) -> float:
        """US dollars for so many tokens."""
        hours = tokens / self.tokens_per_second / 3600
        return hours * self.job.world_size * self.cluster.price_per_gpu_hour

    def to_dict(self) -> dict[str, Any]:
        """All figures, for programs: bytes, operations, seconds, US dollars."""
        return {
            "cluster": self.cluster.model_dump(),
            "ranks": self.job.world_size,
            "nodes": self.num_nodes,
            "fits": self.fits,
            "capacity_bytes": self.capacity,
            "peak_bytes": self.peak,
            "stages": [
                {
                    "teacher_layers": self.teacher.layout.stage_layers[index],
                    "teacher_parameters": stage.teacher_parameters,
                    "peak_bytes": stage.peak,
                    "worst_moment": stage.worst,
                    "parts_bytes": stage.parts,
                    "flops_per_microbatch": self.stage_flops[index],
                    "seconds_per_microbatch": self.stage_seconds[index],
                }
                for index, stage in enumerate(self.memory)
            ],
            "transfers": {name: vars(transfer) for name, transfer in self.transfers.items()},
            "extraction": {"flops_per_microbatch": self.head_flops, "seconds_per_microbatch": self.extraction},
            "window": {"microbatches": WINDOW, "tokens": self.window_tokens, "seconds": self.window_seconds},
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "tokens": self.tokens,
            "cache_bytes_per_token_at_most": self.bytes_per_token,
            "dollars_per_billion_tokens": self.price(1e9),
        }


def build_cache_plan(job: Job, cluster: Cluster) -> CachePlan:
    """Work out the memory, traffic and time of a job that `job.build_cache_job` built."""
    teacher = job.teacher
    assert teacher is not None
    rows, width = job.micro_tokens(teacher), job.head_vocab // teacher.layout.tp
    head_flops = 2.0 * rows * teacher.architecture.hidden_size * width
    extraction = product_seconds(cluster, head_flops, teacher.element_size)
    extraction += (
        memory_seconds(cluster, _PASSES * rows * width * 4) + _sequence_transfer(job, teacher, cluster).seconds
    )
    return CachePlan(
        job=job,
        cluster=cluster,
        memory=cache_memory(job),
        stage_flops=teacher_flops(job),
        head_flops=head_flops,
        stage_seconds=teacher_stage_seconds(job, cluster),
        extraction=extraction,
        transfers=_window_transfers(job, teacher, cluster),
    )


def cache_memory(job: Job) -> list[StageMemory]:
    """The memory of each stage's ranks."""
    teacher = job.teacher
    assert teacher is not None
    stages = []
    for stage, parameters in enumerate(stage_parameters(teacher, has_head=False)):
        is_last = stage == teacher.layout.pp - 1
        head = job.head_vocab // teacher.layout.tp * teacher.architecture.hidden_size if is_last else 0
        resident = {"teacher": float((parameters.count + head) * teacher.element_size)}
        # In main memory are the window before, which is encoded, and the next one too; a device has the one at work.
        windows = 3 if job.device_type == "cpu" else 1
        resident["batches"] = windows * WINDOW * job.micro_tokens(teacher) * BATCH_BYTES
        if teacher.layout.sequence_parallel:
            resident["gathered sequences"] = job.micro_tokens(teacher) * _width(teacher)
        moments = _moments(job, teacher, is_last=is_last)
        stages.append(StageMemory(0, parameters.count + head, resident, moments))
    return stages


def _width(teacher: Model) -> int:
    """Bytes of a token's hidden state."""
    return teacher.architecture.hidden_size * teacher.element_size


def _moments(job: Job, teacher: Model, *, is_last: bool) -> dict[str, dict[str, float]]:
    tokens, width = job.micro_tokens(teacher), _width(teacher)
    at_work = tokens * forward_bytes(teacher)
    states = tokens * width / teacher.layout.sequence_shards
    if not is_last:
        # The schedule holds on to what it sent until the next one is there.
        return {"teacher": {"passing by": at_work + states}}
    kept = _kept_bytes(job, tokens)
    signals = {"signals": WINDOW * states}
    before = WINDOW * kept if job.device_type == "cpu" else 0.0  # in main memory
    gathered = tokens * width * (2 if teacher.layout.sequence_parallel else 1)  # and the rows that count
    extraction = {"logits": _logits_bytes(job, teacher), "passing by": gathered + kept + _search_bytes(job)}
    return {
        "teacher": signals | {"kept": before, "passing by": at_work},
        "keeping": signals | {"kept": 2 * before} | extraction,
    }


def _kept_bytes(job: Job, tokens: int) -> float:
    """What is taken of so many tokens, before it is encoded: ids, log-probabilities in fp64, entropy and log-odds."""
    settings = cache_codec(job.config).settings()
    each = ids_per_token(settings) * 8 + 8
    if settings["mode"] == "topk":
        each += settings["k"] * 8 + 8
    return float(tokens * each)


def _logits_bytes(job: Job, teacher: Model) -> float:
    """A chunk of logits, and the masses of its blocks with what sums them."""
    width = job.head_vocab // teacher.layout.tp
    size = job.chunk * width * 4.0
    if teacher.element_size != 4 and job.device_type == "cpu":
        size += job.chunk * width * teacher.element_size  # the product's result in the model's type
    masses = 2 * job.chunk * width / BLOCK_COLUMNS * 8
    return size + masses


def _search_bytes(job: Job) -> float:
    """Of a chunk's rows: the blocks that have draws, or exponentials in fp64 before that, whichever are more."""
    width = job.head_vocab // job.student.layout.tp
    settings = cache_codec(job.config).settings()
    draws = settings["num_samples"] if settings["mode"] == "sampled" else settings["tail_samples"]
    searched = min(SEARCHED_COLUMNS, job.chunk * draws * BLOCK_COLUMNS) * _SEARCH_BYTES
    largest = job.chunk * settings["k"] * BLOCK_COLUMNS * 12 if settings["mode"] == "topk" else 0
    exponentials = min(0.75 * BLOCK_BYTES[job.device_type], job.chunk * width * 12)
    return float(max(searched, largest, exponentials))


def _sequence_transfer(job: Job, teacher: Model, cluster: Cluster) -> Transfer:
    """A microbatch's hidden states put together before the head."""
    if not teacher.layout.sequence_parallel:
        return NOTHING
    group = teacher.layout.tensor_group(cluster.ranks_per_node)
    return gather(cluster, group, job.micro_tokens(teacher) * _width(teacher))


def _window_transfers(job: Job, teacher: Model, cluster: Cluster) -> dict[str, Transfer]:
    layer = layer_transfer(job, teacher, cluster, backward=False)
    first, *others = [layer.times(layers) for layers in teacher.layout.stage_layers]
    stages = [first.plus(embedding_transfer(job, teacher, cluster, backward=False)), *others]
    stages[-1] = stages[-1].plus(_sequence_transfer(job, teacher, cluster))
    transfers = {"tensor ranks": slowest(stages).times(WINDOW)}
    if teacher.layout.pp > 1:
        between = [boundary_transfer(job, teacher, cluster, stage) for stage in range(teacher.layout.pp - 1)]
        transfers["stages"] = slowest(between).times(WINDOW)
    return {name: transfer for name, transfer in transfers.items() if transfer != NOTHING}
