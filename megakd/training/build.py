"""From the configuration to the objects of a run: meshes, models, optimizer, data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from megakd.cache.reader import CacheReader
from megakd.config.architecture import GPTArchitecture
from megakd.config.layouts import has_own_layout, teacher_micro_batch_size, teacher_parallel
from megakd.config.schema import Config, OptimizerSection, ParallelSection
from megakd.convert import load_weights
from megakd.models.gpt import HiddenStateGPT, build_gpt
from megakd.models.parameters import canonical_parameters
from megakd.parallel.bridge import Bridge, last_stage_spread
from megakd.parallel.mesh import GroupPool, ModelMesh, build_model_mesh
from megakd.parameters.sharding import padded_vocab_size
from megakd.platform import communication_timeout
from megakd.teacher import CachedTeacher, OnlineTeacher, build_online_teacher
from megakd.teacher.online import Crossing
from megakd.training.architectures import student_architecture, teacher_architecture
from megakd.training.teacher_cache import place_samples
from megakd.training.train_data import TrainData

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Student:
    """The model in training on its mesh."""

    model: DistributedDataParallel
    architecture: GPTArchitecture
    mesh: ModelMesh
    sequence_parallel: bool


def build_meshes(config: Config) -> tuple[ModelMesh, ModelMesh | None]:
    """The student's mesh and, where there is a teacher, the teacher's own, over the same ranks."""
    pool = GroupPool(communication_timeout(config.safeguards.hang_timeout_seconds))
    is_online = config.teacher is not None and config.teacher.source == "online"
    return build_mesh(config.parallel, pool), build_mesh(teacher_parallel(config), pool) if is_online else None


def build_mesh(parallel: ParallelSection, pool: GroupPool) -> ModelMesh:
    """A model's mesh over the whole world."""
    return build_model_mesh(
        pool,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
    )


def build_student(config: Config, mesh: ModelMesh, layer_spec: str) -> Student:
    """Build the student's stage, from a Hugging Face folder or at random, and wrap it for data parallelism."""
    architecture = student_architecture(config)
    init, parallel = config.student.init, config.parallel
    model = build_gpt(
        architecture,
        mesh,
        dtype=DTYPES[config.run.dtype],
        layer_spec=layer_spec,
        make_vocab_size_divisible_by=config.student.make_vocab_size_divisible_by,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=config.student.recompute_granularity,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        seed=config.run.seed if init is None else None,
    )
    if init is not None:
        load_weights(
            canonical_parameters(model).items(),
            init.path,
            architecture,
            tp_rank=mesh.tp_rank,
            tp_size=mesh.tp_size,
            divisible_by=config.student.make_vocab_size_divisible_by,
            layer_map=init.layers,
        )
    wrapped = wrap_data_parallel(model, mesh, config.optimizer)
    return Student(wrapped, architecture, mesh, model.config.sequence_parallel)


def wrap_data_parallel(model: HiddenStateGPT, mesh: ModelMesh, optimizer: OptimizerSection) -> DistributedDataParallel:
    """megatron-core's data parallelism around a stage: fp32 gradient buffers, reduced as the optimizer needs them."""
    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=optimizer.overlap_grad_reduce,
            overlap_param_gather=optimizer.overlap_param_gather,
            use_distributed_optimizer=optimizer.use_distributed_optimizer,
        ),
        model,
        pg_collection=mesh.groups,
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    if optimizer.overlap_grad_reduce:
        model.config.no_sync_func = wrapped.no_sync
    return wrapped


def build_adam(student: Student, section: OptimizerSection, dtype: torch.dtype) -> MegatronOptimizer:
    """Adam with decoupled weight decay, none on vectors (norms and biases)."""
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=section.lr,
            min_lr=section.min_lr,
            weight_decay=section.weight_decay,
            adam_beta1=section.adam_beta1,
            adam_beta2=section.adam_beta2,
            adam_eps=section.adam_eps,
            clip_grad=section.clip_grad,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=section.use_distributed_optimizer,
            overlap_param_gather=section.overlap_param_gather,
        ),
        [student.model],
        use_gloo_process_groups=False,
        pg_collection=student.mesh.groups,
    )
    for group in optimizer.param_groups:
        # megatron-core leaves the multiplier (0 for vectors) to its own scheduler, which is not used here.
        group["weight_decay"] = section.weight_decay * group["wd_mult"]
    student.model.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def build_teacher(config: Config, mesh: ModelMesh, student_mesh: ModelMesh, layer_spec: str) -> OnlineTeacher:
    """The teacher on `mesh`, its head in the student's vocabulary partition."""
    assert config.teacher is not None
    vocab_size = student_architecture(config).vocab_size
    return build_online_teacher(
        config.teacher.path,
        teacher_architecture(config),
        mesh,
        dtype=DTYPES[config.teacher.dtype or config.run.dtype],
        layer_spec=layer_spec,
        sequence_parallel=teacher_parallel(config).sequence_parallel,
        student_mesh=student_mesh,
        student_padded_vocab=padded_vocab_size(vocab_size, config.student.make_vocab_size_divisible_by),
        crossing=build_crossing(config, mesh, student_mesh) if has_own_layout(config) else None,
        is_parked=config.teacher.offload == "cpu",
    )


def build_crossing(config: Config, mesh: ModelMesh, student_mesh: ModelMesh) -> Crossing:
    """The way of hidden states from a teacher's layout to the student's. Collective over the world."""
    assert config.teacher is not None
    parallel, micro_batch_size = teacher_parallel(config), teacher_micro_batch_size(config)
    source = last_stage_spread(mesh, micro_batch_size, is_cut=parallel.sequence_parallel)
    target = last_stage_spread(student_mesh, config.data.micro_batch_size, is_cut=True)
    world = dist.group.WORLD
    assert world is not None
    bridge = Bridge(
        source,
        target,
        world,
        width=teacher_architecture(config).hidden_size,
        dtype=DTYPES[config.teacher.dtype or config.run.dtype],
        device=torch.device(torch.cuda.current_device()),
    )
    return Crossing(student_mesh, micro_batch_size, bridge)


def build_cached_teacher(config: Config, data: TrainData) -> CachedTeacher | None:
    """The teacher out of a cache, where the configuration names one.

    Raises:
        UserError: it is not of this run's data, or cannot be read.
    """
    if config.teacher is None or config.teacher.source != "cache":
        return None
    reader = CacheReader(config.teacher.path)
    return CachedTeacher(reader, place_samples(config, reader, data))
