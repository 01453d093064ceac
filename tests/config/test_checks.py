"""Every rule with what it refuses and what it lets through; uneven stages against megatron-core itself."""

from __future__ import annotations

from typing import Any

import pytest

from megakd.common.errors import UserError
from megakd.config import architecture_checks, checks, data_checks, loss_checks, teacher_checks
from megakd.config.architecture import GPTArchitecture
from megakd.config.schema import ParallelSection
from tests.config.examples import ARCHITECTURE, config

TP, PP, CP = "parallel__tensor_model_parallel_size", "parallel__pipeline_model_parallel_size", "context_parallel_size"
FIRST, LAST = "parallel__num_layers_in_first_pipeline_stage", "parallel__num_layers_in_last_pipeline_stage"
OWN_RANKS = {"teacher__placement": "dedicated", "teacher__ranks": 2}
NEW = {"student": {"architecture": ARCHITECTURE}}
TOKENS = {"schedule__train_steps": None, "schedule__train_tokens": 32 * 16 * 5 + 1}

# rule, changes to a valid configuration, arguments after it, how the line begins
REFUSED: list[tuple[str, dict[str, Any], tuple[int, ...], str]] = [
    ("student_source", {"student": {}}, (), "student has neither init nor architecture; it must have exactly one."),
    ("student_source", {"student": {"init": {"path": "x"}, "architecture": ARCHITECTURE}}, (),
     "student has both init and architecture; it must have exactly one."),
    ("temperature", {"distill__temperature": 0}, (),
     "distill.temperature is 0; it must be > 0. Use 1.0 to leave the logits unscaled."),
    ("temperature", {"distill__temperature": -1.5}, (), "distill.temperature is -1.5; it must be > 0."),
    ("temperature", {"distill__teacher_temperature": 0}, (),
     "distill.teacher_temperature is 0; it must be > 0. Leave it out to use distill.temperature for both models."),
    ("divergence", {"distill__jsd_beta": 0.5}, (),
     "distill.jsd_beta is 0.5 and has no effect on distill.loss forward_kl. Leave it out, or set distill.loss to jsd."),
    ("divergence", {"distill__loss": "jsd", "distill__skew_alpha": 0.5}, (),
     "distill.skew_alpha is 0.5 and has no effect on distill.loss jsd. Leave it out, or set distill.loss to "
     "skew_forward_kl or skew_reverse_kl."),
    ("divergence", {"distill__loss": "jsd", "distill__jsd_beta": 0}, (),
     "distill.jsd_beta is 0; it must be between 0 and 1, both excluded. Use distill.loss forward_kl (what 0 tends to) "
     "or reverse_kl (1)."),
    ("divergence", {"distill__loss": "jsd", "distill__jsd_beta": 1}, (), "distill.jsd_beta is 1; it must be between"),
    ("divergence", {"distill__loss": "skew_reverse_kl", "distill__skew_alpha": 1}, (),
     "distill.skew_alpha is 1; it must be between 0 and 1, both excluded. Use distill.loss reverse_kl for 0."),
    ("without_divergence", {"distill__kd_weight": 0, "distill__ce_weight": 1, "distill__teacher_temperature": 2}, (),
     "distill.teacher_temperature is 2 and has no effect with distill.kd_weight 0. Leave it out, or set "),
    ("without_divergence", {"distill__kd_weight": 0, "distill__ce_weight": 1, "distill__loss": "tvd"}, (),
     "distill.loss is tvd and has no effect with distill.kd_weight 0. Leave it out (or forward_kl), or set "),
    ("without_divergence", {"distill__kd_weight": 0, "distill__ce_weight": 1, "distill__temperature": 3}, (),
     "distill.temperature is 3"),
    ("without_divergence", {"distill__kd_weight": 0, "distill__ce_weight": 1, "distill__temperature_squared": False},
     (), "distill.temperature_squared is false and has no effect with distill.kd_weight 0."),
    ("loss_weights", {"distill__kd_weight": 0}, (), "distill.kd_weight and distill.ce_weight are both 0; at least one"),
    ("teacher", {"teacher": None}, (), "distill.kd_weight is 1 and there is no teacher section. Set teacher.path, or"),
    ("cached_teacher", {"teacher": {"path": "x", "source": "cache", "dtype": "bf16"}}, (),
     "teacher.dtype is bf16 and has no effect on a cache (teacher.source). Leave it out."),
    ("cached_teacher", {"teacher": {"path": "x", "source": "cache"}, "distill__loss": "jsd"}, (),
     "teacher.source is cache and distill.loss is jsd; only forward_kl can be had from some of the teacher's ids"),
    ("cached_teacher",
     {"teacher": {"path": "x", "source": "cache"}, "distill__kd_weight": 0, "distill__ce_weight": 1}, (),
     "teacher.source is cache and has no effect with distill.kd_weight 0."),
    ("teacher_layout", {"teacher": {"path": "x", "source": "cache", "signal_window": 2}}, (),
     "teacher.signal_window is given and has no effect on a cache (teacher.source), which is no model that runs."),
    ("teacher_layout", {"teacher": {"path": "x", "source": "cache", "parallel": {"tensor_model_parallel_size": 2}}},
     (), "teacher.parallel is given and has no effect on a cache"),
    ("teacher_layout", {"teacher__signal_window": 2, "distill__kd_weight": 0, "distill__ce_weight": 1}, (),
     "teacher.signal_window is 2 and has no effect with distill.kd_weight 0: no signals are held."),
    ("teacher_layout", {"teacher__parallel": {"sequence_parallel": True}}, (),
     "teacher.parallel.sequence_parallel is true and has no effect with one tensor rank."),
    ("teacher_layout",
     {"teacher__parallel": {"sequence_parallel": True, "tensor_model_parallel_size": 3}}, (),
     "data.sequence_length is 32; with a teacher in a layout of its own it must be a multiple of "
     "teacher.parallel.tensor_model_parallel_size, 3. Use 30 or 33."),
    ("teacher_layout", {TP: 3, "teacher__parallel": {"tensor_model_parallel_size": 1}}, (),
     "data.sequence_length is 32; with a teacher in a layout of its own it must be a multiple of "
     "parallel.tensor_model_parallel_size, 3."),
    ("teacher_ranks", {"teacher__parallel": {"tensor_model_parallel_size": 4}}, (2,),
     "the run has 2 ranks; there must be a multiple of the teacher's tensor_model_parallel_size 4 x "
     "pipeline_model_parallel_size 1 = 4 (teacher.parallel). Start 4 ranks, or change teacher.parallel."),
    ("teacher_ranks", {"teacher__signal_window": 3}, (2,),
     "teacher.signal_window is 3; it must divide the 4 microbatches of a step (data.global_batch_size 16 / "
     "(data.micro_batch_size 2 x data-parallel size 2)). Use 1, 2 or 4."),
    ("teacher_ranks", {"teacher__signal_window": 1, "teacher__parallel": {"micro_batch_size": 4}}, (2,),
     "the teacher goes through 4 samples at a time (1 microbatches of 2 on 2 of the student's data ranks); they must "
     "be a multiple of teacher.parallel.micro_batch_size 4 x its data-parallel size 2 = 8. Set teacher.signal_window "
     "to 2 or 4, or change teacher.parallel.micro_batch_size or data.global_batch_size."),
    ("teacher_ranks", {"teacher__signal_window": 3, "teacher__parallel": {"micro_batch_size": 4}}, (2,),
     "teacher.signal_window is 3; it must divide the 4 microbatches of a step (data.global_batch_size 16 / "
     "(data.micro_batch_size 2 x data-parallel size 2)). Use 2 or 4."),
    ("teacher_ranks", {"teacher__signal_window": 3, "teacher__parallel": {"micro_batch_size": 16}}, (2,),
     "teacher.signal_window is 3; it must divide the 4 microbatches of a step (data.global_batch_size 16 / "
     "(data.micro_batch_size 2 x data-parallel size 2)). None of these is a multiple of the 32 samples"),
    ("dedicated_ranks",
     {**OWN_RANKS, "teacher__ranks": 3, "teacher__parallel": {"tensor_model_parallel_size": 2}}, (3,),
     "teacher.ranks is 3 and the run has 3 ranks, which leaves 3 - 3 = 0 to the student; it needs a multiple of "
     "tensor_model_parallel_size 1 x pipeline_model_parallel_size 1 = 1. Start 5 ranks with teacher.ranks 4 "),
    ("best", {"evaluation": {"patience": 2}}, (),
     "evaluation.patience is 2 and evaluation.metric is null; patience counts evaluations without a better"),
    ("best", {"evaluation": {"metric": "cross_entropy"}, "data__valid": ["x"]}, (),
     "evaluation.metric is cross_entropy and evaluation.interval is null; the best checkpoint is one of those"),
    ("best", {"evaluation": {"metric": "agreement", "interval": 2}, "data__valid": ["x"],
              "teacher": {"path": "x", "source": "cache"}}, (),
     "evaluation.metric is agreement and teacher.source is cache; it is measured against the teacher itself. Use "),
    ("best", {"evaluation": {"metric": "kl_to_teacher", "interval": 2}, "data__valid": ["x"], "teacher": None,
              "distill__kd_weight": 0, "distill__ce_weight": 1}, (),
     "evaluation.metric is kl_to_teacher and there is no teacher section; it is measured against the teacher itself."),
    ("cache", {"cache": {"k": 4}}, (), "cache.k is 4 and has no effect on cache.mode sampled. Leave it out, or set"),
    ("cache", {"cache": {"mode": "topk", "num_samples": 4}}, (),
     "cache.num_samples is 4 and has no effect on cache.mode topk."),
    ("cache", {"cache": {"tail_samples": 4}}, (),
     "cache.tail_samples is 4 and has no effect on cache.mode sampled."),
    ("cache", {"cache": {"log_probability_bits": 16}}, (), "cache.log_probability_bits is 16 and has no effect on"),
    ("held_out_source", {"data__valid": "v", "data__valid_fraction": 0.1}, (),
     "data.valid is 'v' and data.valid_fraction is 0.1; at most one may be given."),
    ("held_out_source", {"data__test": "v", "data__test_fraction": 0.1}, (),
     "data.test is 'v' and data.test_fraction is 0.1; at most one may be given."),
    ("held_out_source", {"data__valid_fraction": 0.5, "data__test_fraction": 0.5}, (),
     "data.valid_fraction is 0.5 and data.test_fraction is 0.5; together they must be below 1."),
    ("blend", {"data__train": [{"path": "a", "weight": 2}, "b"]}, (),
     "data.train: a has a weight and b has none; either every data set has a weight, or none has"),
    ("blend", {"data__train": ["b", {"path": "a", "weight": 2, "epochs": 1}]}, (),
     "data.train: a has both weight and epochs; either every data set has a weight"),
    ("blend", {"data__train": [{"path": "a", "weight": 2}]}, (),
     "data.train: a has weight 2, which has no effect on a single data set. Leave it out."),
    ("blend", {"data__valid": [{"path": "a", "epochs": 2}]}, (),
     "data.valid: a has epochs 2; held-out data is read once. Leave it out."),
    ("blend", {"data__test": [{"path": "a", "weight": 2}]}, (), "data.test: a has weight 2; held-out data is read "),
    ("evaluation_data", {"evaluation__split": "test", "data__valid": "v"}, (),
     "evaluation.split is test and no such data is named. Set data.test or data.test_fraction"),
    ("evaluation_data", {"evaluation__split": "test", "evaluation__at_end": True, "data__valid": "v"}, (),
     "evaluation.at_end is true and no held-out data is named. Set data.test or data.test_fraction"),
    ("evaluation_data", {"evaluation__interval": 5}, (),
     "evaluation.interval is 5 and no held-out data is named. Set data.valid or data.valid_fraction, or leave "),
    ("evaluation_data", {"evaluation__at_start": True}, (), "evaluation.at_start is true and no held-out data"),
    ("evaluation_data", {"evaluation__at_end": True}, (), "evaluation.at_end is true and no held-out data"),
    ("run_length", {"schedule": {}}, (), "the length of the run is missing; exactly one of schedule.train_steps, "),
    ("run_length", {"schedule__train_tokens": 5}, (), "schedule.train_steps and schedule.train_tokens are given; "),
    ("run_length", {"schedule__train_epochs": 1}, (), "schedule.train_steps and schedule.train_epochs are given; "),
    ("learning_rates", {"optimizer__min_lr": 0.01}, (),
     "optimizer.min_lr is 0.01; it must be at most optimizer.lr, 0.001. Lower it or raise optimizer.lr."),
    ("warmup", {"schedule__lr_warmup_steps": 10}, (),
     "schedule.lr_warmup_steps is 10; it must be less than schedule.train_steps, 10. Use at most 9, or train for "),
    ("warmup", {**TOKENS, "schedule__lr_warmup_steps": 6}, (),
     "schedule.lr_warmup_steps is 6; it must be less than the run's 6 steps (schedule.train_tokens 2561 in steps of "
     "data.sequence_length 32 x data.global_batch_size 16 = 512 tokens). Use at most 5, or train for longer."),
    ("overlap_param_gather", {"optimizer__overlap_param_gather": True, "optimizer__overlap_grad_reduce": True}, (),
     "optimizer.overlap_param_gather is true; it needs optimizer.use_distributed_optimizer, which is false. Set "),
    ("overlap_param_gather", {"optimizer__overlap_param_gather": True, "optimizer__use_distributed_optimizer": True},
     (), "optimizer.overlap_param_gather is true; it needs optimizer.overlap_grad_reduce, which is false. Set "),
    ("context_parallel", {f"parallel__{CP}": 2}, (),
     "parallel.context_parallel_size is 2; only 1 is built so far. Set it to 1."),
    ("sequence_parallel", {"parallel__sequence_parallel": True}, (),
     "parallel.sequence_parallel is true and has no effect with one tensor rank. Set it to false or "
     "tensor_model_parallel_size above 1."),
    ("sequence_parallel", {"parallel__sequence_parallel": True, TP: 3}, (),
     "data.sequence_length is 32; with parallel.sequence_parallel it must be a multiple of "
     "parallel.tensor_model_parallel_size, 3. Use 30 or 33, or set parallel.sequence_parallel to false."),
    ("stage_split", {FIRST: 2}, (), "parallel.num_layers_in_first_pipeline_stage is 2; it needs parallel.pipeline_"),
    ("stage_split", {LAST: 2}, (), "parallel.num_layers_in_last_pipeline_stage is 2; it needs parallel.pipeline_"),
    ("written_architecture", {**NEW, TP: 8}, (), "parallel.tensor_model_parallel_size is 8; it must divide the "),
    ("written_architecture", {**NEW, PP: 2, LAST: 6}, (), "parallel.num_layers_in_last_pipeline_stage is 6; that "),
    ("written_architecture", {"student": {"architecture": ARCHITECTURE, "make_vocab_size_divisible_by": 51}, TP: 2},
     (), "parallel.tensor_model_parallel_size is 2; it must divide the student's padded vocabulary, 255 (vocab_size"),
    ("micro_batches", {"data__micro_batch_size": 3}, (),
     "data.global_batch_size is 16; it must be a multiple of data.micro_batch_size, 3. Use 15 or 18, or another "),
    ("world_size", {TP: 2, PP: 2}, (6,),
     "the run has 6 ranks; there must be a multiple of tensor_model_parallel_size 2 x pipeline_model_parallel_size 2 "
     "= 4, the ranks of one model replica. Start 4 or 8 ranks, or change the parallel section."),
    ("world_size", {TP: 2, PP: 2}, (2,), "the run has 2 ranks; there must be a multiple of "
     "tensor_model_parallel_size 2 x pipeline_model_parallel_size 2 = 4, the ranks of one model replica. "
     "Start 4 ranks, or"),
    ("world_size", {TP: 2, PP: 2, **OWN_RANKS}, (8,),
     "the run has 8 ranks, of which teacher.ranks 2 are the teacher's and 6 the student's; the student's must be a "
     "multiple of tensor_model_parallel_size 2 x pipeline_model_parallel_size 2 = 4, the ranks of one model replica. "
     "Start 6 or 10 ranks, or change teacher.ranks or the parallel section."),
    ("dedicated_ranks", {TP: 2, **OWN_RANKS}, (2,),
     "teacher.ranks is 2 and the run has 2 ranks, which leaves 2 - 2 = 0 to the student; it needs a multiple of "
     "tensor_model_parallel_size 2 x pipeline_model_parallel_size 1 = 2. Start 4 ranks (--nproc-per-node), or lower"),
    ("teacher_placement", {"teacher__placement": "dedicated"}, (),
     "teacher.placement is dedicated and teacher.ranks is null; it must say how many of the job's ranks are the"),
    ("teacher_placement", {**OWN_RANKS, "teacher__offload": "cpu"}, (),
     "teacher.offload is cpu and has no effect with teacher.placement dedicated, whose ranks have nothing else"),
    ("teacher_placement", {**OWN_RANKS, "distill__kd_weight": 0, "distill__ce_weight": 1}, (),
     "teacher.placement is dedicated, distill.kd_weight is 0 and no held-out data is named; the teacher's ranks would"),
    ("teacher_placement", {"teacher__ranks": 2}, (),
     "teacher.ranks is 2 and has no effect with teacher.placement colocated. Leave it out, or set teacher.placement"),
    ("teacher_placement", {"teacher__prefetch_steps": 0}, (),
     "teacher.prefetch_steps is 0 and has no effect with teacher.placement colocated."),
    ("teacher_layout", {"teacher": {"path": "x", "source": "cache", "placement": "dedicated"}}, (),
     "teacher.placement is given and has no effect on a cache (teacher.source), which is no model that runs."),
    ("teacher_ranks", {**OWN_RANKS, "teacher__ranks": 3, "teacher__parallel": {"tensor_model_parallel_size": 2}}, (4,),
     "teacher.ranks is 3; it must be a multiple of the teacher's tensor_model_parallel_size 2 x "
     "pipeline_model_parallel_size 1 = 2 (teacher.parallel), and what it leaves of 4 ranks one of the student's "
     "tensor_model_parallel_size 1 x pipeline_model_parallel_size 1 = 1. Use 2, or change teacher.parallel or the "
     "number of ranks."),
    ("teacher_ranks", {**OWN_RANKS, "teacher__ranks": 3, "teacher__parallel": {"tensor_model_parallel_size": 4}}, (4,),
     "teacher.ranks is 3; it must be a multiple of the teacher's tensor_model_parallel_size 4 x "
     "pipeline_model_parallel_size 1 = 4 (teacher.parallel), and what it leaves of 4 ranks one of the student's "
     "tensor_model_parallel_size 1 x pipeline_model_parallel_size 1 = 1. Change teacher.parallel or the number of "),
    ("teacher_ranks", {**OWN_RANKS, "teacher__ranks": 16}, (17,),
     "the teacher goes through 16 samples at a time (8 microbatches of 2 on 1 of the student's data ranks); they must "
     "be a multiple of teacher.parallel.micro_batch_size 2 x its data-parallel size 16 = 32. Change "),
    ("global_batch", {TP: 2}, (6,),
     "data.global_batch_size is 16; it must be a multiple of data.micro_batch_size 2 x data-parallel size 3 = 6 "
     "(6 ranks / (tensor_model_parallel_size 2 x pipeline_model_parallel_size 1)). Use 12 or 18."),
]  # fmt: skip

ACCEPTED: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("student_source", {}, ()),
    ("student_source", NEW, ()),
    ("temperature", {"distill__temperature": 1e-6}, ()),
    ("temperature", {"distill__teacher_temperature": 2.0}, ()),
    ("divergence", {"distill__loss": "jsd"}, ()),
    ("divergence", {"distill__loss": "jsd", "distill__jsd_beta": 0.9}, ()),
    ("divergence", {"distill__loss": "skew_forward_kl", "distill__skew_alpha": 0.9}, ()),
    ("divergence", {"distill__loss": "skew_reverse_kl", "distill__skew_alpha": 0.9}, ()),
    ("without_divergence", {"distill__teacher_temperature": 2.0}, ()),
    ("without_divergence", {"distill__kd_weight": 0, "distill__ce_weight": 1}, ()),
    ("loss_weights", {"distill__kd_weight": 0, "distill__ce_weight": 0.1}, ()),
    ("loss_weights", {}, ()),
    ("blend", {"data__train": [{"path": "a", "weight": 2}, {"path": "b", "weight": 0.1}]}, ()),
    ("blend", {"data__train": [{"path": "a", "epochs": 2}, "b"], "data__valid": ["v", "w"]}, ()),
    ("held_out_source", {"data__valid_fraction": 0.5, "data__test_fraction": 0.4}, ()),
    ("evaluation_data", {"evaluation__split": "test", "data__test_fraction": 0.4}, ()),
    ("teacher", {"distill__kd_weight": 0, "distill__ce_weight": 1}, ()),
    ("teacher", {"distill__kd_weight": 0, "distill__ce_weight": 1, "teacher": None}, ()),
    ("cached_teacher", {"teacher": {"path": "x", "source": "cache"}, "distill__ce_weight": 1}, ()),
    ("cached_teacher", {"teacher": {"path": "x", "source": "cache"}, "distill__teacher_temperature": 2.0}, ()),
    ("cache", {"cache": {"mode": "topk", "k": 4, "log_probability_bits": 32}}, ()),
    ("cache", {"cache": {"num_samples": 4, "scope": "run"}}, ()),
    ("held_out_source", {"data__valid": "v"}, ()),
    ("held_out_source", {"data__valid_fraction": 0.1}, ()),
    ("evaluation_data", {"evaluation__interval": 5, "data__valid": "v"}, ()),
    ("evaluation_data", {"evaluation__at_end": True, "data__valid_fraction": 0.5}, ()),
    ("evaluation_data", {"evaluation__max_tokens": 5}, ()),
    ("run_length", {}, ()),
    ("run_length", {"schedule": {"train_tokens": 5}}, ()),
    ("run_length", {"schedule": {"train_epochs": 0.5}}, ()),
    ("learning_rates", {"optimizer__min_lr": 0.001}, ()),
    ("warmup", {"schedule__lr_warmup_steps": 9}, ()),
    ("warmup", {**TOKENS, "schedule__lr_warmup_steps": 5}, ()),
    ("warmup", {"schedule": {"train_epochs": 1, "lr_warmup_steps": 10**6}}, ()),
    ("overlap_param_gather", {"optimizer__overlap_grad_reduce": True}, ()),
    ("overlap_param_gather", {"optimizer__overlap_param_gather": True, "optimizer__use_distributed_optimizer": True,
                              "optimizer__overlap_grad_reduce": True}, ()),
    ("context_parallel", {}, ()),
    ("sequence_parallel", {"parallel__sequence_parallel": True, TP: 4}, ()),
    ("sequence_parallel", {TP: 3}, ()),
    ("stage_split", {FIRST: 2, LAST: 1, PP: 2}, ()),
    ("stage_split", {}, ()),
    ("written_architecture", {**NEW, TP: 4, PP: 3}, ()),
    ("written_architecture", {**NEW, PP: 2, FIRST: 5}, ()),
    ("written_architecture", {}, ()),
    ("best", {"evaluation": {"metric": "kl_to_teacher", "interval": 2, "patience": 1}, "data__valid": ["x"]}, ()),
    ("best", {"evaluation": {"metric": "perplexity", "interval": 2}, "data__valid": ["x"],
              "teacher": {"path": "x", "source": "cache"}}, ()),
    ("micro_batches", {"data__micro_batch_size": 16}, ()),
    ("world_size", {TP: 2, PP: 2}, (8,)),
    ("global_batch", {TP: 2}, (16,)),
    ("world_size", {TP: 2, PP: 2, **OWN_RANKS, "teacher__parallel": {"pipeline_model_parallel_size": 1}}, (10,)),
    ("dedicated_ranks", {TP: 2, **OWN_RANKS}, (4,)),
    ("dedicated_ranks", {}, (1,)),
    ("teacher_placement", {**OWN_RANKS, "teacher__prefetch_steps": 0}, ()),
    ("teacher_placement",
     {**OWN_RANKS, "distill__kd_weight": 0, "distill__ce_weight": 1, "data__valid_fraction": 0.1}, ()),
    ("teacher_placement", {}, ()),
    ("teacher_ranks", {**OWN_RANKS, "teacher__parallel": {"pipeline_model_parallel_size": 2}}, (3,)),
    ("teacher_layout", {"teacher__parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}, ()),
    ("teacher_ranks", {"teacher__signal_window": 2, "teacher__parallel": {"pipeline_model_parallel_size": 2}}, (2,)),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "changes", "arguments", "line"), REFUSED)
def test_refused(rule: str, changes: dict[str, Any], arguments: tuple[int, ...], line: str) -> None:
    changed = config(**changes)
    with pytest.raises(UserError) as own:
        getattr(checks, f"check_{rule}")(changed, *arguments)
    assert str(own.value).startswith(line), str(own.value)
    assert len(str(own.value).splitlines()) == 1
    with pytest.raises(UserError) as all_rules:
        checks.check_config(changed, *arguments)
    assert str(all_rules.value) == str(own.value)


@pytest.mark.parametrize(("rule", "changes", "arguments"), ACCEPTED)
def test_accepted(rule: str, changes: dict[str, Any], arguments: tuple[int, ...]) -> None:
    changed = config(**changes)
    getattr(checks, f"check_{rule}")(changed, *arguments)
    checks.check_config(changed, *arguments)


def test_every_rule_is_tested_both_ways() -> None:
    rules = {
        name.removeprefix("check_")
        for name, rule in vars(checks).items()
        if name.startswith("check_")
        and rule.__module__ in {module.__name__ for module in (checks, data_checks, loss_checks, teacher_checks)}
    }
    assert {rule for rule, *_ in REFUSED} == {rule for rule, *_ in ACCEPTED} == rules - {"config", "cache_config"}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"teacher": None}, "there is no teacher section; a cache is written from a teacher. Set teacher.path to"),
        ({"teacher": {"path": "x", "source": "cache"}}, "teacher.source is cache; a cache is written from a teacher."),
        ({"distill__loss": "tvd"}, "a cache is to be written and distill.loss is tvd; only forward_kl can be had"),
        ({"cache": {"k": 3}}, "cache.k is 3 and has no effect on cache.mode sampled."),
        ({TP: 3}, "there are 4 ranks to write a cache; there must be a multiple of the teacher's tensor_model_par"),
    ],
)
def test_a_cache_that_cannot_be_written(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        checks.check_cache_config(config(**changes), 4)
    assert str(error.value).startswith(line)


def test_a_cache_is_written_whatever_the_student_s_layout_allows() -> None:
    # Six layers and microbatches of two would not do for a student on these ranks.
    checks.check_cache_config(config(**{**NEW, TP: 2, PP: 4, "data__global_batch_size": 10}), 8)


def test_rules_about_ranks_wait_for_their_number() -> None:
    changed = config(**{TP: 2, PP: 2, "data__global_batch_size": 10})
    checks.check_config(changed)
    with pytest.raises(UserError, match="^the run has 6 ranks"):
        checks.check_config(changed, 6)


def shape(**changes: Any) -> GPTArchitecture:
    return GPTArchitecture(**(ARCHITECTURE | changes))


def check_model(role: checks.Role, architecture: GPTArchitecture, length: int = 32, divisible_by: int = 128,
                split: bool = True, **layout: int) -> None:  # fmt: skip
    names = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size",
             "first": "num_layers_in_first_pipeline_stage", "last": "num_layers_in_last_pipeline_stage"}  # fmt: skip
    parallel = ParallelSection(**{names[key]: value for key, value in layout.items()})  # type: ignore[arg-type]
    architecture_checks.check_architecture(
        role, architecture, parallel, length, has_stage_split=split, divisible_by=divisible_by
    )


@pytest.mark.parametrize(
    ("role", "changes", "arguments", "line"),
    [
        ("teacher", {"max_position_embeddings": 512}, {"length": 1024},
         "data.sequence_length is 1024; the teacher's positions end at 512 (max_position_embeddings). Use at most 512"),
        ("student", {}, {"length": 65}, "data.sequence_length is 65; the student's positions end at 64 "),
        ("student", {"num_moe_experts": 4}, {"tp": 2},
         "parallel.sequence_parallel is false; a student with experts (num_moe_experts 4) needs it with "
         "tensor_model_parallel_size 2. Set it to true."),
        ("teacher", {"num_moe_experts": 4, "moe_ffn_hidden_size": 3}, {"tp": 2},
         "parallel.tensor_model_parallel_size is 2; it must divide the teacher's moe_ffn_hidden_size, 3. Use 1."),
        ("student", {}, {"tp": 3},
         "parallel.tensor_model_parallel_size is 3; it must divide the student's num_attention_heads, 8. Use 1, 2 or "
         "4."),
        ("teacher", {}, {"tp": 8},
         "parallel.tensor_model_parallel_size is 8; it must divide the teacher's num_query_groups, 4 (copies of a "
         "group on several ranks are not supported). Use 1, 2 or 4."),
        ("student", {"num_query_groups": 1}, {"tp": 2}, "parallel.tensor_model_parallel_size is 2; it must divide the "
         "student's num_query_groups, 1 (copies of a group on several ranks are not supported). Use 1."),
        ("student", {"ffn_hidden_size": 90}, {"tp": 4},
         "parallel.tensor_model_parallel_size is 4; it must divide the student's ffn_hidden_size, 90. Use 1 or 2."),
        ("student", {}, {"tp": 4, "divisible_by": 51},
         "parallel.tensor_model_parallel_size is 4; it must divide the student's padded vocabulary, 255 (vocab_size "
         "250 up to a multiple of 51). Use another size, or set student.make_vocab_size_divisible_by to 204."),
        ("teacher", {}, {"tp": 4, "divisible_by": 51},
         "parallel.tensor_model_parallel_size is 4; it must divide the teacher's padded vocabulary, 255 (vocab_size "
         "250 up to a multiple of 51). Use another size."),
        ("student", {}, {"pp": 4},
         "parallel.pipeline_model_parallel_size is 4; it must divide the student's 6 layers. Use 1, 2, 3 or 6, or give "
         "the first or the last stage its own number of layers."),
        ("teacher", {}, {"pp": 4, "first": 3, "split": False},
         "parallel.pipeline_model_parallel_size is 4; it must divide the teacher's 6 layers, whose stages are always "
         "equal. Use 1, 2, 3 or 6."),
        ("student", {}, {"pp": 3, "first": 1},
         "parallel.num_layers_in_first_pipeline_stage is 1; that leaves 5 of the student's 6 layers, and each of the 2 "
         "other stages of parallel.pipeline_model_parallel_size 3 must get the same number, at least 1. Change "
         "parallel.num_layers_in_first_pipeline_stage."),
        ("student", {}, {"pp": 2, "last": 6},
         "parallel.num_layers_in_last_pipeline_stage is 6; that leaves 0 of the student's 6 layers, and the other "
         "stage of parallel.pipeline_model_parallel_size 2 must get at least 1. Change parallel.num_layers_in_last_"),
        ("student", {}, {"pp": 2, "first": 3, "last": 2},
         "parallel.num_layers_in_first_pipeline_stage is 3 and parallel.num_layers_in_last_pipeline_stage is 2; with 2 "
         "stages they must add up to the student's 6 layers. Change "),
    ],
)  # fmt: skip
def test_models_that_do_not_fit(
    role: checks.Role, changes: dict[str, Any], arguments: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_model(role, shape(**changes), **arguments)
    assert str(caught.value).startswith(line), str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("role", "changes", "arguments"),
    [
        ("student", {}, {"length": 64}),
        ("student", {}, {"tp": 4, "pp": 3}),
        ("teacher", {}, {"tp": 2, "pp": 6}),
        ("student", {}, {"tp": 4, "divisible_by": 64}),
        ("teacher", {}, {"pp": 2, "first": 5, "split": False}),
        ("student", {}, {"pp": 2, "first": 5}),
        ("student", {}, {"pp": 4, "first": 1, "last": 1}),
        ("student", {"num_layers": 5}, {"pp": 2, "first": 3, "last": 2}),
    ],
)
def test_models_that_fit(role: checks.Role, changes: dict[str, Any], arguments: dict[str, Any]) -> None:
    check_model(role, shape(**changes), **arguments)


def _megatron_stages(num_layers: int, stages: int, first: int | None, last: int | None) -> list[int] | None:
    """Layers per stage as megatron-core builds them; None where it refuses."""
    import torch
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig

    try:
        configuration = TransformerConfig(
            num_layers=num_layers,
            hidden_size=8,
            num_attention_heads=1,
            pipeline_model_parallel_size=stages,
            pipeline_dtype=torch.float32,
            num_layers_in_first_pipeline_stage=first,
            num_layers_in_last_pipeline_stage=last,
        )
        return [get_num_layers_to_build(configuration, pp_rank=rank) for rank in range(stages)]
    except (AssertionError, ValueError):
        return None


def test_layers_divide_over_stages_where_megatron_core_builds_every_stage() -> None:
    sizes = [None, 1, 2, 5]
    agreed = {True: 0, False: 0}
    for stages in (2, 3, 4):
        for num_layers in range(1, 9):
            for first in sizes:
                for last in sizes:
                    built = _megatron_stages(num_layers, stages, first, last)
                    # It lets a stage have no layer, or fewer than none.
                    works = built is not None and min(built) >= 1 and sum(built) == num_layers
                    try:
                        architecture_checks.check_layer_split("student", num_layers, stages, first, last)
                        fits = True
                    except UserError:
                        fits = False
                    assert fits == works, (num_layers, stages, first, last, built)
                    agreed[fits] += 1
    assert min(agreed.values()) > 50, agreed


def test_tensor_split_refuses_all_that_megatron_core_refuses() -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    for heads, groups, size in [(8, 4, 3), (6, 2, 4), (6, 3, 2), (12, 4, 6), (8, 8, 16)]:
        with pytest.raises((AssertionError, ValueError)):
            TransformerConfig(num_layers=1, hidden_size=64 * heads, num_attention_heads=heads,
                              num_query_groups=groups, tensor_model_parallel_size=size)  # fmt: skip
        with pytest.raises(UserError):
            architecture_checks.check_tensor_split(
                "student", shape(num_attention_heads=heads, num_query_groups=groups, kv_channels=8), size
            )
