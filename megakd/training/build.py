"""From the configuration to the objects of a run: meshes, models, optimizer, data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from torch import Tensor

from megakd.cache.reader import CacheReader
from megakd.config.architecture import GPTArchitecture
from megakd.config.layouts import (
    has_own_layout,
    prefetch_steps,
    teacher_is_dedicated,
    teacher_micro_batch_size,
    teacher_parallel,
)
from megakd.config.schema import Config, OptimizerSection, ParallelSection
from megakd.convert import load_head, load_weights
from megakd.models.gpt import HiddenStateGPT, build_gpt
from megakd.models.parameters import canonical_parameters
from megakd.parallel.bridge import Bridge
from megakd.parallel.mesh import GroupPool, ModelMesh, build_model_mesh
from megakd.parallel.pieces import last_stage_spread
from megakd.parameters.shapes import padded_vocab_size
from megakd.platform import Joint, communication_timeout
from megakd.teacher import (
    CachedTeacher,
    OnlineTeacher,
    RemoteTeacher,
    TeacherServer,
    TeacherStage,
    build_teacher_stage,
)
from megakd.teacher.online import Crossing
from megakd.teacher.parking import ParkedWeights
from megakd.teacher.regrouping import Placement
from megakd.teacher.turns import StudentTurns, TeacherTurns
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
    """The student's mesh and, where a teacher runs on the same ranks, the teacher's own."""
    pool = GroupPool(communication_timeout(config.safeguards.hang_timeout_seconds))
    shares = config.teacher is not None and config.teacher.source == "online" and not teacher_is_dedicated(config)
    return build_mesh(config.parallel, pool), build_mesh(teacher_parallel(config), pool) if shares else None


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
    """The teacher on the student's ranks as `mesh` lays them, its head in the student's vocabulary partition."""
    assert config.teacher is not None
    stage = build_stage(config, mesh, layer_spec)
    crossing = None
    if has_own_layout(config):
        bridge = build_bridge(config, student_mesh.ranks, mesh.ranks, dist.get_rank())
        student = Placement(student_mesh, config.data.micro_batch_size)
        crossing = Crossing(student, Placement(mesh, teacher_micro_batch_size(config)), bridge)
    # The head stays where it is: the loss needs it while the teacher does not run.
    parked = ParkedWeights(stage.model) if config.teacher.offload == "cpu" else None
    return OnlineTeacher(stage, load_teacher_head(config, student_mesh), crossing, parked)


def build_remote_teacher(config: Config, joint: Joint, student_mesh: ModelMesh) -> RemoteTeacher:
    """What the student's ranks have of a teacher on ranks of its own."""
    bridge = build_bridge(config, *_sides(joint), joint.rank)
    turns = StudentTurns(joint.store) if joint.rank == 0 else None
    return RemoteTeacher(load_teacher_head(config, student_mesh), student_mesh, bridge, joint.group, turns)


def build_teacher_server(
    config: Config, joint: Joint, mesh: ModelMesh, layer_spec: str, beat: Callable[[], None]
) -> TeacherServer:
    """What the teacher's own ranks do; `mesh` is over them alone, `beat` is called while the student lives."""
    ahead = prefetch_steps(config) * config.data.global_batch_size
    turns = TeacherTurns(joint.store, ahead, torch.device(torch.cuda.current_device()), beat)
    bridge = build_bridge(config, *_sides(joint), joint.rank)
    return TeacherServer(build_stage(config, mesh, layer_spec), bridge, joint.group, turns)


def build_stage(config: Config, mesh: ModelMesh, layer_spec: str) -> TeacherStage:
    """This rank's stage of the teacher."""
    assert config.teacher is not None
    return build_teacher_stage(
        config.teacher.path,
        teacher_architecture(config),
        mesh,
        dtype=_teacher_dtype(config),
        layer_spec=layer_spec,
        sequence_parallel=teacher_parallel(config).sequence_parallel,
    )


def load_teacher_head(config: Config, student_mesh: ModelMesh) -> Tensor | None:
    """The teacher's output layer on the student's last stage, in the student's vocabulary partition; else None."""
    assert config.teacher is not None
    if not student_mesh.is_last_stage:
        return None
    vocab_size = student_architecture(config).vocab_size
    return load_head(
        config.teacher.path,
        tp_rank=student_mesh.tp_rank,
        tp_size=student_mesh.tp_size,
        padded_vocab=padded_vocab_size(vocab_size, config.student.make_vocab_size_divisible_by),
        dtype=_teacher_dtype(config),
        device=torch.cuda.current_device(),
    )


def build_bridge(config: Config, students: Sequence[int], teachers: Sequence[int], rank: int) -> Bridge:
    """This rank's part in the way of hidden states from the teacher's ranks to the student's.

    Args:
        students, teachers: ranks of both models; the same ones where the teacher is colocated.
        rank: this one's number among them.
    """
    own, parallel = teacher_parallel(config), config.parallel
    source = last_stage_spread(
        teachers,
        tp_size=own.tensor_model_parallel_size,
        pp_size=own.pipeline_model_parallel_size,
        micro_batch_size=teacher_micro_batch_size(config),
        is_cut=own.sequence_parallel,
    )
    target = last_stage_spread(
        students,
        tp_size=parallel.tensor_model_parallel_size,
        pp_size=parallel.pipeline_model_parallel_size,
        micro_batch_size=config.data.micro_batch_size,
        is_cut=True,
    )
    return Bridge(
        source,
        target,
        rank,
        width=teacher_architecture(config).hidden_size,
        dtype=_teacher_dtype(config),
        device=torch.device(torch.cuda.current_device()),
    )


def _sides(joint: Joint) -> tuple[range, range]:
    return range(joint.students), range(joint.students, joint.size)


def _teacher_dtype(config: Config) -> torch.dtype:
    assert config.teacher is not None
    return DTYPES[config.teacher.dtype or config.run.dtype]


def build_cached_teacher(config: Config, data: TrainData) -> CachedTeacher | None:
    """The teacher out of a cache, where the configuration names one.

    Raises:
        UserError: it is not of this run's data, or cannot be read.
    """
    if config.teacher is None or config.teacher.source != "cache":
        return None
    reader = CacheReader(config.teacher.path)
    return CachedTeacher(reader, place_samples(config, reader, data))
