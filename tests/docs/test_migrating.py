"""docs/migrating.md has a row with a counterpart for every option of the programs that it is about."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migrating.md"

# The options of OpenRLHF's openrlhf/cli/train_kd.py at 023911e.
OPENRLHF = """
    save_path save_steps save_hf_ckpt disable_ds_ckpt logging_steps eval_steps ckpt_path max_ckpt_num max_ckpt_mem
    load_checkpoint use_ds_universal_ckpt micro_train_batch_size train_batch_size max_norm gradient_checkpointing
    deepcompile seed full_determinism local_rank zero_stage dist_backend bf16 zpg adam_offload flash_attn
    use_liger_kernel aux_loss_coef grad_accum_dtype overlap_comm gradient_checkpointing_use_reentrant
    disable_fast_tokenizer ds_tensor_parallel_size load_in_4bit lora_rank lora_alpha target_modules lora_dropout
    pretrain teacher_model max_epochs kd_coef learning_rate lr_warmup_ratio pretrain_mode lr_scheduler l2 adam_betas
    teacher_offload dataset dataset_probs eval_dataset dataset_split eval_split max_samples input_key output_key
    input_template apply_chat_template max_len use_wandb wandb_org wandb_group wandb_project wandb_run_name
    use_tensorboard use_ms
"""
# The keys of NeMo-Aligner's gpt_knowledge_distillation.yaml at 51a64f2.
NEMO_TRAINING = """
    trainer.num_nodes trainer.devices trainer.accelerator trainer.precision trainer.knowledge_distillation.max_epochs
    trainer.knowledge_distillation.max_steps trainer.knowledge_distillation.val_check_interval
    trainer.knowledge_distillation.save_interval trainer.knowledge_distillation.limit_train_batches
    trainer.knowledge_distillation.limit_val_batches trainer.knowledge_distillation.gradient_clip_val
    trainer.knowledge_distillation.inference_metrics trainer.logger trainer.enable_checkpointing
    trainer.use_distributed_sampler trainer.max_time trainer.max_epochs trainer.max_steps exp_manager.explicit_log_dir
    exp_manager.exp_dir exp_manager.name exp_manager.create_wandb_logger exp_manager.wandb_logger_kwargs.project
    exp_manager.wandb_logger_kwargs.name exp_manager.resume_if_exists exp_manager.resume_ignore_no_checkpoint
    exp_manager.create_checkpoint_callback exp_manager.checkpoint_callback_params.monitor
    exp_manager.checkpoint_callback_params.save_top_k exp_manager.checkpoint_callback_params.mode
    exp_manager.checkpoint_callback_params.save_nemo_on_train_end exp_manager.checkpoint_callback_params.filename
    exp_manager.checkpoint_callback_params.model_parallel_size exp_manager.checkpoint_callback_params.save_best_model
    pretrained_checkpoint.restore_from_path model.mcore_gpt model.micro_batch_size model.global_batch_size
    model.megatron_amp_O2 model.peft.peft_scheme model.peft.restore_from_path model.peft.lora_tuning.target_modules
    model.peft.lora_tuning.adapter_dim model.peft.lora_tuning.adapter_dropout
    model.peft.lora_tuning.column_init_method model.peft.lora_tuning.row_init_method
    model.peft.lora_tuning.layer_selection model.peft.lora_tuning.weight_tying
    model.peft.lora_tuning.position_embedding_strategy model.optim.name model.optim.lr model.optim.weight_decay
    model.optim.betas model.optim.sched.name model.optim.sched.warmup_steps model.optim.sched.constant_steps
    model.optim.sched.min_lr model.knowledge_distillation.target_logits_scale
    model.knowledge_distillation.logits_scale model.knowledge_distillation.kd_loss_weight
    model.knowledge_distillation.sft_loss_weight model.knowledge_distillation.kd_loss
    model.knowledge_distillation.cross_tokenizer model.data.data_impl model.data.n_chunks
    model.data.n_examples_per_chunk model.data.splits_string model.data.seq_length model.data.skip_warmup
    model.data.num_workers model.data.dataloader_type model.data.reset_position_ids model.data.reset_attention_mask
    model.data.eod_mask_loss model.data.index_mapping_dir model.data.data_prefix model.data.top_k
    model.overwrite_base_config.data.data_prefix
"""
# The keys of NeMo-Aligner's compute_topk_logits.yaml at ad2165c.
NEMO_LOGITS = """
    start_from_idx end_at_idx output_path batch_size top_k trainer.num_nodes trainer.devices trainer.accelerator
    trainer.precision trainer.logger trainer.enable_checkpointing trainer.use_distributed_sampler trainer.max_time
    trainer.max_epochs pretrained_checkpoint.restore_from_path model.mcore_gpt model.micro_batch_size
    model.global_batch_size model.megatron_amp_O2 model.seed model.tensor_model_parallel_size
    model.pipeline_model_parallel_size model.restore_from_path model.resume_from_checkpoint
    model.save_nemo_on_validation_end model.sync_batch_comm model.encoder_seq_length model.sequence_parallel
    model.activations_checkpoint_granularity model.activations_checkpoint_method
    model.activations_checkpoint_num_layers model.activations_checkpoint_layers_per_pipeline model.answer_only_loss
    model.gradient_as_bucket_view model.seq_len_interpolation_factor model.use_flash_attention model.hidden_dropout
    model.attention_dropout model.ffn_dropout data.chat data.chat_prompt_tokens.system_turn_start
    data.chat_prompt_tokens.turn_start data.chat_prompt_tokens.label_start data.chat_prompt_tokens.end_of_turn
    data.chat_prompt_tokens.end_of_name data.sample data.num_workers data.dataloader_type data.data.file_path
    data.data.file_names data.data.global_batch_size data.data.micro_batch_size data.data.shuffle
    data.data.memmap_workers data.data.max_seq_length data.data.min_seq_length data.data.drop_last
    data.data.concat_sampling_probabilities data.data.label_key data.data.add_eos data.data.add_sep data.data.add_bos
    data.data.truncation_field data.data.index_mapping_dir data.data.prompt_template data.data.hf_dataset
    data.data.truncation_method
"""


def counterparts() -> dict[str, str]:
    """The second cell of every row, by the option in its first."""
    rows = re.findall(r"^\| `([^`]+)`[^|]*\| ([^|]*)\|", PAGE.read_text(), flags=re.MULTILINE)
    return {option: cell.strip() for option, cell in rows}


@pytest.mark.parametrize("options", [OPENRLHF, NEMO_TRAINING, NEMO_LOGITS], ids=["openrlhf", "nemo", "nemo_logits"])
def test_every_option_has_a_row(options: str) -> None:
    found = counterparts()
    prefix = "--" if options is OPENRLHF else ""
    names = {f"{prefix}{name}" for name in options.split()}
    groups = [option.removesuffix("*") for option in found if option.endswith(".*")]
    assert [n for n in sorted(names) if n not in found and not any(n.startswith(group) for group in groups)] == []


def test_every_row_says_what_takes_the_options_place() -> None:
    for option, cell in counterparts().items():
        assert cell.startswith(("`", "not here", "always")), option
