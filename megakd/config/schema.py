"""Every key a configuration file may hold. Units and defaults stand beside each key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from megakd.config.architecture import GPTArchitecture


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class RunSection(Section):
    """Where the run's files go and what fixes its randomness."""

    name: str = Field(default="distill", min_length=1, description="Name of the run.")
    output_dir: str = Field(description="Folder of the run: checkpoints, metrics, the exported student.")
    seed: int = Field(default=1234, ge=0, lt=2**32, description="Seed of initialisation and of the order of samples.")
    dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Student's weights and activations; bf16 keeps fp32 main weights and gradients."
    )
    layer_spec: Literal["auto", "local", "transformer_engine"] = Field(
        default="auto", description="Layers: ours on torch, Transformer Engine's, or whichever is installed."
    )
    export: bool = Field(default=True, description="Write the student as a Hugging Face folder at the end.")
    time_limit_minutes: float | None = Field(
        default=None,
        gt=0,
        description="Save and end with status 75 when the launch is this old; the same command goes on.",
    )


class StudentInit(Section):
    """Start the student from the weights of a Hugging Face model."""

    path: str = Field(description="Hugging Face folder of safetensors or Megatron checkpoint.")
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None,
        min_length=1,
        description="Layers kept, in this order, counted from 0 (depth pruning). All where not given.",
    )


class StudentSection(Section):
    """The model that is trained: from a Hugging Face folder (`init`) or new (`architecture`)."""

    init: StudentInit | None = Field(default=None, description="Initialise from a model on disk.")
    architecture: GPTArchitecture | None = Field(default=None, description="Shape of a randomly initialised student.")
    make_vocab_size_divisible_by: int = Field(
        default=128, gt=0, description="Embedding rows are padded to a multiple of this, at every TP size alike."
    )
    recompute_granularity: Literal["none", "selective", "full"] = Field(
        default="none", description="Activations computed again in backward: none, core attention, or whole layers."
    )


class TeacherParallelSection(Section):
    """Layout of the teacher over its ranks; what is not given is as the student's."""

    tensor_model_parallel_size: int | None = Field(default=None, gt=0)
    pipeline_model_parallel_size: int | None = Field(default=None, gt=0, description="Its stages are always equal.")
    sequence_parallel: bool | None = Field(default=None, description="The student's where not given and TP is above 1.")
    micro_batch_size: int | None = Field(
        default=None, gt=0, description="Samples per forward pass and rank; data.micro_batch_size where not given."
    )


class TeacherSection(Section):
    """The model that is learnt from."""

    source: Literal["online", "cache"] = Field(
        default="online", description="The model itself beside the student, or what `launch.sh cache` kept of it."
    )
    path: str = Field(
        description="Hugging Face folder of safetensors or Megatron checkpoint; with source cache, the cache's folder."
    )
    dtype: Literal["fp32", "bf16"] | None = Field(default=None, description="Defaults to run.dtype.")
    parallel: TeacherParallelSection = Field(
        default=TeacherParallelSection(),
        description="Layout of the teacher over its ranks; what is not given is as the student's.",
    )
    placement: Literal["colocated", "dedicated"] = Field(
        default="colocated", description="On the student's ranks, in turn with it, or on ranks of its own, ahead of it."
    )
    ranks: int | None = Field(
        default=None, gt=0, description="dedicated: the job's last ranks that are the teacher's; the others train."
    )
    prefetch_steps: int | None = Field(
        default=None,
        ge=0,
        description="dedicated: steps that the teacher may be ahead of the student; 1 where not given.",
    )
    signal_window: int | None = Field(
        default=None,
        gt=0,
        description="Microbatches of the student for which the teacher's hidden states are held at a time; all of a "
        "step where not given. What a dedicated teacher is ahead by waits on its own ranks.",
    )
    offload: Literal["none", "cpu"] = Field(
        default="none", description="Where the teacher's weights wait while it does not run: cpu frees the GPU of them."
    )


class CacheSection(Section):
    """What `launch.sh cache` keeps of the teacher, for runs with teacher.source cache."""

    path: str | None = Field(
        default=None, description="Folder to write; <run.output_dir>/teacher_cache where not given."
    )
    mode: Literal["sampled", "topk"] = Field(
        default="sampled", description="Draws from the teacher, or its largest probabilities and draws from the rest."
    )
    num_samples: int | None = Field(
        default=None, ge=1, le=65535, description="sampled: draws per token; 32 where not given."
    )
    k: int | None = Field(default=None, ge=1, description="topk: ids per token; 32 where not given.")
    log_probability_bits: Literal[8, 16, 32] | None = Field(
        default=None, description="topk: bits of each log-probability; 8 where not given."
    )
    tail_samples: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="topk: draws from the other ids (3 where not given); 0 keeps their mass alone.",
    )
    scope: Literal["dataset", "run"] = Field(
        default="dataset", description="All training samples, or those alone that the run's steps will visit."
    )


class ParallelSection(Section):
    """Layout of the student over ranks; data parallelism takes the ranks that are left."""

    tensor_model_parallel_size: int = Field(default=1, gt=0)
    pipeline_model_parallel_size: int = Field(default=1, gt=0)
    context_parallel_size: int = Field(default=1, gt=0, description="Needs Transformer Engine; only 1 is built so far.")
    sequence_parallel: bool = Field(default=False, description="Split norms and residuals along the sequence over TP.")
    num_layers_in_first_pipeline_stage: int | None = Field(default=None, gt=0, description="The student's.")
    num_layers_in_last_pipeline_stage: int | None = Field(default=None, gt=0, description="The student's.")


class DistillSection(Section):
    """The objective: kd_weight * T^2 * divergence + ce_weight * cross-entropy, per token."""

    loss: Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"] = Field(
        default="forward_kl", description="Divergence from the teacher."
    )
    jsd_beta: float | None = Field(
        default=None, description="The teacher's share of the mixture in jsd, between 0 and 1; 0.5 where not given."
    )
    skew_alpha: float | None = Field(
        default=None,
        description="Share of the mixture that skew_forward_kl and skew_reverse_kl add to the model that would stand "
        "there alone, between 0 and 1; 0.1 where not given.",
    )
    kd_weight: float = Field(default=1.0, ge=0)
    ce_weight: float = Field(default=0.0, ge=0)
    temperature: float = Field(default=1.0, description="Divides both models' logits in the divergence; above 0.")
    teacher_temperature: float | None = Field(
        default=None, description="Divides the teacher's logits in the place of `temperature`; above 0."
    )
    temperature_squared: bool = Field(default=True, description="Multiply the divergence by `temperature` squared.")
    loss_chunk_mib: int | None = Field(
        default=None, gt=0, description="Memory for a chunk of logits, MiB; 96 on CPU and 1024 on GPU where not given."
    )


class DataSource(Section):
    """A data set, alone or in a blend."""

    path: str = Field(description="Path of a .bin/.idx pair without its ending.")
    weight: float | None = Field(
        default=None, gt=0, description="Its share of the samples, in proportion to the other data sets' weights."
    )
    epochs: float | None = Field(
        default=None, gt=0, description="How often an epoch of the blend goes through it; 1 where no weights are given."
    )


def _as_sources(value: object) -> object:
    """A path, or a list of paths and sections, as a list of sections."""
    entries = value if isinstance(value, list | tuple) else [value]
    for entry in entries:
        if not isinstance(entry, str | Mapping | DataSource):
            raise ValueError(f"{entry!r} is not a path, nor a section with path and weight or epochs")
    return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]


DataSources = Annotated[
    list[DataSource],
    Field(min_length=1),
    BeforeValidator(_as_sources, json_schema_input_type=str | list[str | DataSource]),
]


class DataSection(Section):
    """Token files written by tools/preprocess_data.py and how they are cut into samples."""

    train: DataSources = Field(description="Path of a .bin/.idx pair without its ending, or a list to blend.")
    valid: DataSources | None = Field(default=None, description="Held-out pairs; or give `valid_fraction`.")
    test: DataSources | None = Field(
        default=None, description="Held-out pairs for evaluation.split test; or give `test_fraction`."
    )
    valid_fraction: float | None = Field(
        default=None, gt=0, lt=1, description="Share of each training data set, near its end, that is held out."
    )
    test_fraction: float | None = Field(
        default=None, gt=0, lt=1, description="Share of each training data set, at its end, that is held out for test."
    )
    sequence_length: int = Field(gt=0, description="Positions of a sample.")
    reset_position_ids: bool = Field(
        default=False, description="Text: positions begin again at 0 with each document of a sample."
    )
    reset_attention_mask: bool = Field(default=False, description="Text: tokens attend to their own document alone.")
    eod_mask_loss: bool = Field(
        default=False, description="Text: a document's first token is not learnt from the end of the one before."
    )
    loss_on: Literal["assistant", "response", "all"] = Field(
        default="assistant", description="Examples: which tokens count: all assistant turns, the last one, or all."
    )
    truncation: Literal["drop", "keep_start", "keep_end"] = Field(
        default="drop", description="Examples: what becomes of those that are too long for a sample."
    )
    packing: bool = Field(
        default=False, description="Examples: several to a sample, each attending to itself alone, positions from 0."
    )
    micro_batch_size: int = Field(default=1, gt=0, description="Samples per forward pass and rank.")
    global_batch_size: int = Field(gt=0, description="Samples per optimizer step over all ranks.")


class OptimizerSection(Section):
    """Adam with decoupled weight decay, none on biases and norms."""

    lr: float = Field(gt=0, description="Peak learning rate.")
    min_lr: float = Field(default=0.0, ge=0)
    weight_decay: float = Field(default=0.1, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    adam_eps: float = Field(default=1e-8, gt=0)
    clip_grad: float = Field(default=1.0, ge=0, description="Global gradient norm; 0 leaves gradients as they are.")
    use_distributed_optimizer: bool = Field(default=False, description="Shard optimizer state over data ranks.")
    overlap_grad_reduce: bool = Field(default=False, description="Reduce gradients while backward runs.")
    overlap_param_gather: bool = Field(
        default=False, description="Gather parameters while forward runs; needs the distributed optimizer."
    )


class ScheduleSection(Section):
    """Length of the run (exactly one of steps, tokens, epochs) and the learning rate's course."""

    train_steps: int | None = Field(default=None, gt=0)
    train_tokens: int | None = Field(default=None, gt=0)
    train_epochs: float | None = Field(default=None, gt=0)
    lr_decay_style: Literal["constant", "cosine", "linear"] = "cosine"
    lr_warmup_steps: int = Field(default=0, ge=0)


class CheckpointSection(Section):
    """Distributed checkpoints of student, optimizer and position, in <run.output_dir>/checkpoints."""

    save_interval: int | None = Field(default=None, gt=0, description="Steps between checkpoints.")
    save_at_end: bool = Field(default=True, description="Also after the last step.")
    resume: bool = Field(default=True, description="Go on from the newest checkpoint in the run's folder, if any.")
    keep_last: int | None = Field(
        default=None, ge=1, description="Checkpoints that stay, the best one aside; all where not given."
    )
    async_save: bool = Field(
        default=True, description="Train on while a copy of the state, in main memory, is written."
    )
    on_write_error: Literal["continue", "stop"] = Field(
        default="continue", description="What a full or broken disk does to the run; it is said either way."
    )


class SafeguardsSection(Section):
    """What a run does about steps that go wrong or do not end."""

    max_skipped_steps: int = Field(
        default=10, ge=1, description="Steps in a row without a finite loss and gradient norm that end the run."
    )
    loss_spike_deviations: float | None = Field(
        default=6.0, gt=0, description="A loss so many deviations above the recent mean is reported; null: none is."
    )
    hang_timeout_seconds: float | None = Field(
        default=1800.0,
        gt=0,
        description="Without a sign of progress for so long the job ends, with stacks; null: never.",
    )


class WandbSection(Section):
    """The run on Weights & Biases, which must be installed (pip install wandb)."""

    project: str = Field(min_length=1, description="Project that the run appears in.")
    entity: str | None = Field(default=None, min_length=1, description="User or team; the account's own by default.")
    group: str | None = Field(default=None, min_length=1, description="Runs of one group are shown together.")
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]] = Field(
        default=[], description="Words to find it by."
    )
    mode: Literal["online", "offline"] = Field(
        default="online", description="Send figures as they come, or keep them for `wandb sync`."
    )


class ProfileSection(Section):
    """torch.profiler's traces, in <run.output_dir>/profile."""

    steps: list[Annotated[int, Field(ge=1)]] = Field(
        min_length=2, max_length=2, description="First and last step that are traced, counted from 1."
    )
    ranks: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1, description="Ranks that trace them.")


class LoggingSection(Section):
    """What is written while the run goes on."""

    log_interval: int = Field(default=10, gt=0, description="Steps per line on the console and in step_times.jsonl.")
    tensorboard: bool = Field(default=True, description="Write TensorBoard events to <run.output_dir>/tensorboard.")
    wandb: WandbSection | None = Field(default=None, description="Also send the figures to Weights & Biases.")
    profile: ProfileSection | None = Field(default=None, description="Trace some steps with torch.profiler.")


class EvaluationSection(Section):
    """Measurements on held-out data."""

    interval: int | None = Field(default=None, gt=0, description="Steps between evaluations.")
    at_start: bool = Field(default=False, description="Evaluate before the first step.")
    at_end: bool = Field(default=False, description="Evaluate after the last step.")
    max_tokens: int | None = Field(default=None, gt=0, description="Held-out positions read; all where not given.")
    split: Literal["valid", "test"] = Field(default="valid", description="Which held-out data is measured.")
    metric: Literal["cross_entropy", "perplexity", "kl_to_teacher", "agreement"] | None = Field(
        default=None, description="What makes a checkpoint the best: it is saved when measured, and kept."
    )
    patience: int | None = Field(
        default=None, ge=1, description="Evaluations in a row without a better `metric` that end the run."
    )


class Config(Section):
    """A whole run."""

    run: RunSection
    student: StudentSection
    teacher: TeacherSection | None = None
    cache: CacheSection = CacheSection()
    parallel: ParallelSection = ParallelSection()
    distill: DistillSection = DistillSection()
    data: DataSection
    optimizer: OptimizerSection
    schedule: ScheduleSection
    checkpoint: CheckpointSection = CheckpointSection()
    safeguards: SafeguardsSection = SafeguardsSection()
    logging: LoggingSection = LoggingSection()
    evaluation: EvaluationSection = EvaluationSection()
