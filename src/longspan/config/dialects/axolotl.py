"""axolotl's keys that are not keys of longspan, and how each is handled.

The keys that longspan shares with axolotl have axolotl's names.
"""

from __future__ import annotations

from typing import Any

from longspan.config.dialects.external import ExternalName, becomes, choice, no_effect, refused

_KERNEL = "The attention kernel is chosen by attention_backend (auto: the fastest that is installed)."
_LOSS = "The loss is computed in chunks always; logits of a whole sequence are never held."
_LOADING = "Every rank reads only its own part of the weights."
_TRACKER = "Records go to metrics.jsonl, TensorBoard and Weights & Biases (use_wandb)."
_RAY = "Start the processes with torchrun, or with --num-machines and --machine-rank."
_SCHEDULE = "The schedule has warmup_steps, lr_scheduler and cosine_min_lr_ratio."
_OPTIMIZER = "AdamW has one learning rate for all parameters: learning_rate."
_MODEL = (
    "The architecture is read from base_model; single keys (rope_scaling, sliding_window, ...) override it."
)
_RL = "Only pretraining and supervised fine-tuning are supported."
_PACKING = "Packing looks at all samples at once."
_HUB = "Nothing is uploaded. Upload output_dir/hf with huggingface-cli."
_WRAP = "FSDP2 shards layer by layer, whatever the model."
_QUANTISED = "Weights are float32, computed with in bf16; quantised weights are not supported."
_OLD_TRICK = "It is not supported; leave it out."


def _plugins(value: Any) -> dict[str, Any]:
    """No keys for plugins that only add what longspan has built in; other plugins raise ValueError."""
    for name in [value] if isinstance(value, str) else value:
        if not any(part in name.lower() for part in ("cut_cross_entropy", "liger")):
            raise ValueError(name)
    return {}


def _flag(**keys: Any):
    """The choices of a boolean: True sets the keys, False sets nothing."""
    return {True: keys, False: {}}


# YAML reads ``no`` as false.
_EVALUATION = choice(
    {"steps": {}, "epoch": {"evals_per_epoch": 1}, "no": {"eval_iters": 0}, False: {"eval_iters": 0}},
    "steps (with eval_steps), epoch or no.",
)

_FSDP: dict[str, ExternalName] = {
    "activation_checkpointing": choice(_flag(gradient_checkpointing=True), "true or false."),
    "auto_wrap_policy": refused(_WRAP, unless=("TRANSFORMER_BASED_WRAP", "NO_WRAP")),
    "transformer_layer_cls_to_wrap": no_effect(_WRAP),
    "min_num_params": refused(_WRAP),
    "mixed_precision_policy": choice(
        {"bf16": {"bf16": True}, "bfloat16": {"bf16": True}, "fp32": {"bf16": False}, "no": {"bf16": False}},
        "Use bf16, whose range needs no loss scaling.",
    ),
    "sharding_strategy": choice(
        {"FULL_SHARD": {"reshard_after_forward": True}, "SHARD_GRAD_OP": {"reshard_after_forward": False}},
        "FULL_SHARD or SHARD_GRAD_OP; for copies of sharded weights use dp_replicate_size.",
    ),
    "state_dict_type": no_effect(
        "Checkpoints are sharded and load at any layout; export_hf writes whole weights."
    ),
    "final_state_dict_type": no_effect("The final weights are whole, in output_dir/hf (export_hf)."),
    "cpu_ram_efficient_loading": no_effect(_LOADING),
    "sync_module_states": no_effect(_LOADING),
    "use_orig_params": no_effect("FSDP2 keeps parameters as they are."),
    "cpu_offload_pin_memory": no_effect("Offloaded weights are pinned on CUDA."),
    "forward_prefetch": no_effect("FSDP2 gathers the next layer ahead."),
    "backward_prefetch": no_effect("FSDP2 gathers the next layer ahead."),
    "limit_all_gathers": no_effect("FSDP2 limits them."),
    "version": refused("FSDP2 is the one there is.", unless=(2,)),
    "fsdp_version": refused("FSDP2 is the one there is.", unless=(2,)),
}

KEYS: dict[str, ExternalName] = {
    **{f"fsdp_config.{name}": handling for name, handling in _FSDP.items()},
    # parallelism
    "heads_k_stride": no_effect("All key/value heads travel together."),
    "ring_attn_func": choice(
        {
            "varlen_llama3": {"cp_comm_type": "all_gather"},
            "batch_ring": {"cp_comm_type": "p2p"},
            "batch_zigzag": {"cp_comm_type": "p2p", "cp_layout": "zigzag"},
        },
        "Say it by cp_comm_type (p2p, all_gather, a2a, a2a+p2p) and cp_layout.",
    ),
    "expert_parallel_backend": refused("Say it by moe_token_dispatcher_type: alltoall or allgather."),
    "expert_parallel_token_capacity": refused("Say it by moe_expert_capacity_factor."),
    "ddp": no_effect("dp_replicate_size says how many copies of the weights there are."),
    "ddp_bucket_cap_mb": no_effect("FSDP2 reduces gradients layer by layer."),
    "ddp_broadcast_buffers": no_effect("The buffers of models are the same on all ranks already."),
    "ddp_find_unused_parameters": no_effect("Every parameter is used."),
    "deepspeed": refused(
        "Parameters, gradients and optimizer are sharded by FSDP2: dp_shard_size (ZeRO-3's way)."
    ),
    "deepcompile": refused("DeepSpeed is not used."),
    "use_ray": refused(_RAY),
    "ray_num_workers": refused(_RAY),
    "ray_run_name": refused(_RAY),
    "resources_per_worker": refused(_RAY),
    "fsdp_version": refused("FSDP2 is the one there is: fsdp_version: 2.", unless=(2, None)),
    "fsdp": refused("The list form is axolotl's old one. dp_shard_size and fsdp_config say it."),
    "fsdp_config": refused("A mapping of keys, such as {reshard_after_forward: true}."),
    "fp32_norms": refused("Norms compute in float32; their weights follow bf16 as all weights do."),
    "fp32_norm_classes": refused("Norms compute in float32; their weights follow bf16 as all weights do."),
    # model, data, sequence
    "model_type": no_effect("The architecture is read from base_model's config.json."),
    "base_model_config": refused(_MODEL),
    "is_llama_derived_model": no_effect("The architecture is read from base_model's config.json."),
    "is_mistral_derived_model": no_effect("The architecture is read from base_model's config.json."),
    "overrides_of_model_config": refused(_MODEL),
    "model_config": refused(_MODEL),
    "trust_remote_code": refused(
        "Code from a model's repository is never run; the supported models are built in."
    ),
    "tokenizer_use_fast": no_effect("Tokenizers are the fast ones (tokenizer.json)."),
    "tokenizer_legacy": no_effect("Tokenizers are the fast ones (tokenizer.json)."),
    "tokens": refused("Add tokens to the tokenizer and to base_model first, with transformers."),
    "added_tokens_overrides": refused("Change the tokenizer first, with transformers."),
    "eval_sequence_len": refused("Evaluation uses sequence_len; longspan eval takes another."),
    "min_sample_len": refused("Filter the dataset first."),
    "pretraining_dataset": refused(
        "Use datasets: with type: completion; the text is tokenised once, into a cache."
    ),
    "streaming": refused("The data is tokenised once, into a cache (dataset_prepared_path)."),
    "dataset_exact_deduplication": refused("Remove duplicates from the dataset first."),
    "shuffle_merged_datasets": refused(
        "Samples are shuffled, by the seed: every step depends on (data, seed, global batch) alone.",
        unless=(True,),
    ),
    "eval_sample_packing": no_effect(
        "Evaluation packs as training does; a packed document's loss is the same."
    ),
    "pad_to_sequence_len": no_effect("Rows are padded to sequence_len; padding never counts in a loss."),
    "pad_to_multiple_of": no_effect(
        "Any length is cut over any number of ranks; padding is the layout's affair."
    ),
    "sample_packing_group_size": no_effect(_PACKING),
    "sample_packing_bin_size": no_effect(_PACKING),
    "sample_packing_eff_est": no_effect("The number of packs is counted, not estimated."),
    "total_num_tokens": no_effect("Tokens are counted."),
    "sample_packing_sequentially": refused("Packs are made in a seeded random order."),
    "group_by_length": refused("sample_packing keeps padding small."),
    "push_dataset_to_hub": refused(_HUB),
    "eot_tokens": no_effect(
        "Where a turn ends is read from the template; its end token counts with the answer."
    ),
    "chat_template_kwargs": refused("Put them in the template: chat_template_jinja."),
    "default_system_message": refused("Put a system message in the conversations, or in the template."),
    # batch, schedule, optimizer
    "eval_batch_size": no_effect("Evaluation takes micro_batch_size; the loss is the same at any size."),
    "lr_scheduler_kwargs": refused(_SCHEDULE),
    "cosine_constant_lr_ratio": refused(_SCHEDULE),
    "optim_args": refused("AdamW's are adam_beta1, adam_beta2, adam_epsilon and weight_decay."),
    "optim_target_modules": refused(_OPTIMIZER),
    "embedding_lr": refused(_OPTIMIZER),
    "embedding_lr_scale": refused(_OPTIMIZER),
    "lr_groups": refused(_OPTIMIZER),
    "loraplus_lr_ratio": refused(_OPTIMIZER),
    # precision, memory, kernels
    "fp16": refused("Use bf16: true, whose range needs no loss scaling."),
    "float16": refused("Use bf16: true, whose range needs no loss scaling."),
    "bfloat16": refused("Weights stay float32 and compute in bf16: bf16: true."),
    "fp8": refused("Use bf16."),
    "torch_compile_backend": refused("Inductor is the one torch_compile: true takes.", unless=("inductor",)),
    "torch_compile_mode": refused(
        "torch_compile: true compiles in the default mode; captured graphs of others do not fit between exchanges.",
        unless=("default",),
    ),
    "gradient_checkpointing_kwargs": no_effect("Recomputation is the non-reentrant one."),
    "selective_checkpointing": choice(_flag(gradient_checkpointing="selective"), "true or false."),
    "layer_offloading": refused(
        "Use offload_params: true, which keeps weights and optimizer in the CPU's memory."
    ),
    "attn_implementation": refused(
        "Kernels are chosen by attention_backend.",
        unless=("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
    ),
    "flash_attention": no_effect(_KERNEL),
    "flash_attn_cross_entropy": no_effect(_LOSS),
    "flash_attn_rms_norm": no_effect("RMSNorm keeps one tensor for backward."),
    "flash_attn_fuse_mlp": no_effect("The gated MLP keeps two tensors for backward."),
    "sdp_attention": no_effect(_KERNEL),
    "xformers_attention": no_effect(_KERNEL),
    "flex_attention": no_effect(_KERNEL),
    "eager_attention": no_effect(_KERNEL),
    "s2_attention": refused("Attention is exact. For windows use sliding_window."),
    "chunked_cross_entropy": no_effect(_LOSS),
    "chunked_cross_entropy_num_chunks": no_effect(_LOSS),
    "cut_cross_entropy": no_effect(_LOSS),
    "liger_fused_linear_cross_entropy": no_effect(_LOSS),
    "liger_cross_entropy": no_effect(_LOSS),
    "liger_rms_norm": no_effect("RMSNorm keeps one tensor for backward."),
    "liger_rope": no_effect("The rotation is computed in at least float32."),
    "liger_glu_activation": no_effect("The gated MLP keeps two tensors for backward."),
    "liger_layer_norm": no_effect("Norms are PyTorch's."),
    "plugins": becomes(
        _plugins, "Code of plugins is not loaded; the chunked loss and the lean layers are built in."
    ),
    "load_in_8bit": refused(_QUANTISED),
    "load_in_4bit": refused(_QUANTISED),
    "gptq": refused(_QUANTISED),
    "lora_modules_to_save": refused("Only adapters are trained beside frozen weights."),
    "lora_fan_in_fan_out": refused("It is for layers whose weight is transposed; these have none."),
    "lora_layers_to_transform": refused("Adapters go to all layers."),
    "lora_mlp_kernel": no_effect("Adapters compute with PyTorch's products."),
    "lora_qkv_kernel": no_effect("Adapters compute with PyTorch's products."),
    "lora_o_kernel": no_effect("Adapters compute with PyTorch's products."),
    "peft_use_dora": refused("Use plain LoRA."),
    "relora_steps": refused(_OLD_TRICK),
    "lisa_n_layers": refused(_OLD_TRICK),
    "neftune_noise_alpha": refused(_OLD_TRICK),
    "noisy_embedding_alpha": refused(_OLD_TRICK),
    "unfrozen_parameters": refused("All weights are trained, or adapters beside them (adapter: lora)."),
    "device_map": refused("Layers are cut by tensor, context and data parallelism."),
    "max_memory": refused("longspan has no such limit; see docs/memory.md for what saves memory."),
    "gpu_memory_limit": refused("longspan has no such limit; see docs/memory.md for what saves memory."),
    "low_cpu_mem_usage": no_effect(_LOADING),
    # data loading
    "dataloader_num_workers": no_effect(
        "The next steps are read ahead in a thread; any number gives the same batches."
    ),
    "dataloader_pin_memory": no_effect("The next steps are read ahead in a thread."),
    "dataloader_prefetch_factor": no_effect("Two steps are read ahead."),
    "dataloader_drop_last": no_effect("Epochs follow one another without a gap."),
    "dataset_processes": becomes(lambda n: {"dataset_num_proc": int(n)}, "It is dataset_num_proc, a number."),
    # logging, evaluation
    "include_tkps": no_effect("Tokens a second are logged always."),
    "include_tokens_per_second": no_effect("Tokens a second are logged always."),
    "wandb_run_id": refused("Runs go on by resume."),
    "wandb_watch": refused("Gradients are not uploaded; their norm is in the log."),
    "wandb_log_model": refused(_HUB),
    "use_mlflow": refused(_TRACKER),
    "mlflow_tracking_uri": refused(_TRACKER),
    "mlflow_experiment_name": refused(_TRACKER),
    "use_comet": refused(_TRACKER),
    "use_trackio": refused(_TRACKER),
    "eval_strategy": _EVALUATION,
    "evaluation_strategy": _EVALUATION,
    "early_stopping_patience": refused(
        "Watch the held-out loss (eval_steps) and stop the run: Ctrl-C saves."
    ),
    "loss_watchdog_threshold": refused("A loss that is no number ends the run; a high one is in the log."),
    "loss_watchdog_patience": refused("A loss that is no number ends the run; a high one is in the log."),
    "generate_samples": refused("longspan generate writes from a checkpoint's export."),
    "eval_table_size": refused("longspan generate writes from a checkpoint's export."),
    "do_bench_eval": refused("longspan eval gives the loss by position and a needle test."),
    "profiler_steps": refused("Use torch.profiler, or the CUDA tools, around longspan train."),
    "profiler_steps_start": refused("Use torch.profiler, or the CUDA tools, around longspan train."),
    # saving
    "save_strategy": choice(
        {
            "steps": {},
            "epoch": {"saves_per_epoch": 1},
            "no": {"save_last": False},
            False: {"save_last": False},
        },
        "steps (with save_steps), epoch or no.",
    ),
    "save_first_step": refused("Try saving with --max-steps 1."),
    "save_only_model": refused("A checkpoint is whole; export_hf writes the model alone."),
    "save_safetensors": refused("Exports are safetensors.", unless=(True, None)),
    "auto_resume_from_checkpoints": choice(_flag(resume="auto"), "true or false."),
    "dynamic_checkpoint": refused("A SIGTERM or Ctrl-C saves at the end of the step."),
    "hub_model_id": refused(_HUB),
    "hub_strategy": refused(_HUB),
    "hf_use_auth_token": no_effect("The hub's library finds its own token."),
    "load_best_model_at_end": refused("save_steps and eval_steps keep what is needed to choose one."),
    "strict": no_effect("Unknown keys are always refused."),
    "debug": no_effect(
        "longspan config prints what is taken, longspan prepare CONFIG --show 3 what is learned."
    ),
    "local_rank": no_effect("Launchers say it in the environment."),
    # other kinds of training
    "rl": refused(_RL),
    "rl_beta": refused(_RL),
    "dpo_beta": refused(_RL),
    "reward_model": refused(_RL),
    "process_reward_model": refused(_RL),
    "trl": refused(_RL),
}
