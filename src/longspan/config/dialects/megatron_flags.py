"""Megatron-LM's flags that are not keys of longspan, and how each is handled.

The flags of keys are declared in ``config.keys``.
"""

from __future__ import annotations

from typing import Any

from longspan.config.dialects.external import MANY, ExternalName, becomes, choice, no_effect, refused

_SHARDED = "Parameters, gradients and optimizer are sharded by FSDP2 always (dp_shard_size)."
_FUSED = "Kernels are PyTorch's; the fastest one that is there is taken."
_OVERLAP = "FSDP2 gathers and reduces layer by layer while others compute."
_EXACT = "It is so always: at least float32."
_GROUPED = "Experts are computed by grouped products always, where there is a kernel for them."
_PIPELINE = "Give the number of stages a rank instead: --num-virtual-stages-per-pipeline-rank."
_SAMPLES = "The schedule counts steps: --train-iters N, which is samples / --global-batch-size."
_LOGGED = "It is in metrics.jsonl, TensorBoard and the iteration line as far as it exists here."
_TIMERS = (
    "It is for longspan.get_timers() in your own script, where longspan.initialize reads it; a run has its step times in "
    "metrics.jsonl."
)
_CHECKPOINT = "Checkpoints are written by torch.distributed.checkpoint and load at any layout."
_FP8 = "Use --bf16."
_FP8_DETAIL = "It says how fp8 works, which is not there."
_SCALING = "There is no loss scaling: bf16 needs none."
_PROFILE = "Nothing is traced. Use torch.profiler, or the CUDA tools, around the command."
_WATCH = "Slow ranks are always reported, every straggler_interval steps; one that does not come is named after ddp_timeout."
_OLD_OVERLAP = "Exchanges overlap with computing as PyTorch has it."
_DROPOUT = "Dropout is 0: its pattern would depend on the layout."
_LOADER = "The data is read by each machine; the next steps are read ahead in a thread."
_MOCK = "Data is read from .bin/.idx as it is asked for."
_OTHER = "Only decoder language models (GPT, Llama, Mistral, Qwen) are supported."
_SPIKES = "A loss that is no number ends the run before the weights are updated."


def _recompute_layers(value: Any) -> dict[str, Any]:
    if int(value) < 1:
        raise ValueError(value)
    return {}


FLAGS: dict[str, ExternalName] = {
    # model
    "--swiglu": becomes(
        lambda _: {"gated_linear_unit": True, "activation_func": "silu"}, "It takes no value.", values=0
    ),
    "--group-query-attention": no_effect("--num-query-groups alone says it.", values=0),
    "--rotary-interleaved": refused(
        "Halves of a head are paired, as in Hugging Face's checkpoints.", values=0
    ),
    "--use-rope-scaling": becomes(
        lambda _: {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
        "Llama 3.1's scaling by 8; other factors by --rope-scaling '{rope_type: ..., ...}'.",
        values=0,
    ),
    "--rope-scaling-factor": refused(
        "Say the whole: --rope-scaling '{rope_type: llama3, factor: ..., ...}'."
    ),
    "--rotary-seq-len-interpolation-factor": becomes(
        lambda n: {"rope_scaling": {"rope_type": "linear", "factor": float(n)}} if float(n) != 1 else {},
        "A number above 0.",
    ),
    "--make-vocab-size-divisible-by": no_effect(
        "The vocabulary is padded to a multiple of 128, at every layout."
    ),
    "--padded-vocab-size": no_effect("The vocabulary is padded to a multiple of 128, at every layout."),
    "--openai-gelu": refused("GELU is the exact one.", values=0),
    "--quick-geglu": becomes(
        lambda _: {"gated_linear_unit": True, "activation_func": "quick_gelu"}, "It takes no value.", values=0
    ),
    "--apply-residual-connection-post-layernorm": refused("Layers are pre-norm.", values=0),
    "--apply-query-key-layer-scaling": no_effect(
        "Scores are computed in float32: nothing overflows.", values=0
    ),
    "--no-query-key-layer-scaling": no_effect("Scores are not scaled by layers.", values=0),
    "--attention-softmax-in-fp32": no_effect(_EXACT, values=0),
    "--accumulate-allreduce-grads-in-fp32": no_effect(_EXACT, values=0),
    "--fp32-residual-connection": refused("The residual stream is of the computing type.", values=0),
    "--no-rope-fusion": no_effect(_FUSED, values=0),
    "--no-bias-gelu-fusion": no_effect(_FUSED, values=0),
    "--no-bias-swiglu-fusion": no_effect(_FUSED, values=0),
    "--no-bias-dropout-fusion": no_effect(_FUSED, values=0),
    "--no-masked-softmax-fusion": no_effect(_FUSED, values=0),
    "--no-persist-layer-norm": no_effect(_FUSED, values=0),
    "--no-gradient-accumulation-fusion": no_effect(_FUSED, values=0),
    "--use-flash-attn": no_effect(
        "Attention is a flash kernel always; --attention-backend names one.", values=0
    ),
    "--transformer-impl": no_effect("Layers are plain PyTorch."),
    "--use-mcore-models": no_effect("There is one implementation of the models.", values=0),
    "--use-legacy-models": refused("There is one implementation of the models.", values=0),
    "--spec": refused("Layers are those of the config."),
    "--multi-latent-attention": refused("Multi-latent attention is not supported yet.", values=0),
    "--window-size": refused(
        "It is --sliding-window N: the tokens a query sees, itself included.", values=MANY
    ),
    "--moe-grouped-gemm": no_effect(_GROUPED, values=0),
    "--moe-use-legacy-grouped-gemm": no_effect(_GROUPED, values=0),
    "--moe-permute-fusion": no_effect(_FUSED, values=0),
    "--moe-router-fusion": no_effect(_FUSED, values=0),
    "--moe-router-dtype": no_effect("The router computes in float32, or float64 with such weights."),
    "--moe-per-layer-logging": no_effect("metrics.jsonl has the load of each layer always.", values=0),
    "--moe-shared-expert-overlap": no_effect(_OLD_OVERLAP, values=0),
    "--moe-input-jitter-eps": refused("Noise on the router's input would depend on the layout."),
    "--moe-enable-deepep": refused(
        "Tokens travel by --moe-token-dispatcher-type alltoall or allgather.", values=0
    ),
    "--moe-extended-tp": refused("It is --expert-tensor-parallel-size.", values=0),
    "--moe-use-upcycling": refused("A dense model cannot become one with experts here.", values=0),
    "--moe-router-force-load-balancing": refused("Routing is the router's.", values=0),
    "--no-position-embeddings": becomes(
        lambda _: {"position_embedding_type": "none"}, "It takes no value.", values=0
    ),
    "--init-method-xavier-uniform": refused(
        "Weights are drawn from a normal of --init-method-std.", values=0
    ),
    # parallelism
    "--num-layers-per-virtual-pipeline-stage": refused(_PIPELINE),
    "--use-distributed-optimizer": no_effect(_SHARDED, values=0),
    "--use-torch-fsdp2": no_effect(_SHARDED, values=0),
    "--use-megatron-fsdp": no_effect(_SHARDED, values=0),
    "--data-parallel-sharding-strategy": no_effect(_SHARDED),
    "--overlap-grad-reduce": no_effect(_OVERLAP, values=0),
    "--overlap-param-gather": no_effect(_OVERLAP, values=0),
    "--no-overlap-grad-reduce": no_effect(_OVERLAP, values=0),
    "--tp-comm-overlap": no_effect("Tensor parallel exchanges are not split up.", values=0),
    "--no-async-tensor-model-parallel-allreduce": no_effect(
        "Exchanges are waited for where they are needed.", values=0
    ),
    "--ddp-bucket-size": no_effect(_OVERLAP),
    "--DDP-impl": no_effect(_SHARDED),
    "--no-contiguous-buffers-in-local-ddp": no_effect(_SHARDED, values=0),
    "--overlap-param-gather-with-optimizer-step": no_effect(_OVERLAP, values=0),
    "--no-align-grad-reduce": no_effect(_OVERLAP, values=0),
    "--no-align-param-gather": no_effect(_OVERLAP, values=0),
    "--overlap-p2p-communication": no_effect(_OLD_OVERLAP, values=0),
    "--no-overlap-p2p-communication": no_effect(_OLD_OVERLAP, values=0),
    "--use-ring-exchange-p2p": no_effect(_OLD_OVERLAP, values=0),
    "--tp-comm-overlap-cfg": no_effect(_OLD_OVERLAP),
    "--tp-comm-overlap-ag": no_effect(_OLD_OVERLAP, values=0),
    "--tp-comm-overlap-rs": no_effect(_OLD_OVERLAP, values=0),
    "--disable-tp-comm-overlap-ag": no_effect(_OLD_OVERLAP, values=0),
    "--disable-tp-comm-overlap-rs": no_effect(_OLD_OVERLAP, values=0),
    "--delay-wgrad-compute": no_effect(_OLD_OVERLAP, values=0),
    "--high-priority-stream-groups": no_effect(_OLD_OVERLAP, values=MANY),
    "--nccl-ub": no_effect(_OLD_OVERLAP, values=0),
    "--check-for-nan-in-loss-and-grad": no_effect(_SPIKES, values=0),
    "--no-check-for-nan-in-loss-and-grad": no_effect(_SPIKES, values=0),
    "--rerun-mode": no_effect(_SPIKES),
    "--calculate-per-token-loss": no_effect(
        "The loss is the mean over all valid tokens of the global batch, at every layout.", values=0
    ),
    "--distributed-backend": no_effect("NCCL with CUDA, gloo without."),
    "--distributed-timeout-minutes": becomes(lambda m: {"ddp_timeout": 60.0 * m}, "A number of minutes."),
    "--nccl-communicator-config-path": refused(
        "NCCL reads its own environment variables and NCCL_CONF_FILE."
    ),
    "--lazy-mpu-init": no_effect("It is for code outside.", values=0),
    "--enable-gloo-process-groups": no_effect("NCCL with CUDA, gloo without.", values=0),
    "--disable-gloo-process-groups": no_effect("NCCL with CUDA, gloo without.", values=0),
    # batch and schedule
    "--rampup-batch-size": refused("The global batch is the same in every step.", values=MANY),
    "--train-samples": refused(_SAMPLES),
    "--lr-decay-samples": refused(_SAMPLES),
    "--lr-warmup-samples": refused(_SAMPLES, unless=(0, None)),
    "--lr-wsd-decay-style": refused("Schedules are cosine, linear and constant."),
    "--lr-wsd-decay-iters": refused("Schedules are cosine, linear and constant."),
    "--start-weight-decay": refused("--weight-decay is the same in every step."),
    "--end-weight-decay": refused("--weight-decay is the same in every step."),
    "--weight-decay-incr-style": refused("--weight-decay is the same in every step.", unless=("constant",)),
    "--decoupled-lr": refused("AdamW has one learning rate for all parameters: --lr."),
    "--decoupled-min-lr": refused("AdamW has one learning rate for all parameters: --min-lr."),
    "--sgd-momentum": no_effect("The optimizer is AdamW."),
    "--override-opt-param-scheduler": no_effect("The schedule is the command's, always.", values=0),
    "--use-checkpoint-opt-param-scheduler": no_effect("The schedule is the command's, always.", values=0),
    "--use-checkpoint-args": refused("Give the flags; a checkpoint of another model is refused.", values=0),
    "--exit-signal-handler": no_effect("SIGTERM saves at the end of the step, always.", values=0),
    "--manual-gc": no_effect("Nothing waits for Python's collector here.", values=0),
    "--manual-gc-interval": no_effect("Nothing waits for Python's collector here."),
    # precision
    "--loss-scale": no_effect(_SCALING),
    "--initial-loss-scale": no_effect(_SCALING),
    "--min-loss-scale": no_effect(_SCALING),
    "--loss-scale-window": no_effect(_SCALING),
    "--hysteresis": no_effect(_SCALING),
    "--fp8-format": refused(_FP8),
    "--fp8-recipe": refused(_FP8),
    "--fp8-param-gather": refused(_FP8, values=0),
    "--fp8-margin": no_effect(_FP8_DETAIL),
    "--fp8-interval": no_effect(_FP8_DETAIL),
    "--fp8-amax-history-len": no_effect(_FP8_DETAIL),
    "--fp8-amax-compute-algo": no_effect(_FP8_DETAIL),
    "--no-fp8-wgrad": no_effect(_FP8_DETAIL, values=0),
    "--keep-fp8-transpose-cache": no_effect(_FP8_DETAIL, values=0),
    "--first-last-layers-bf16": no_effect(_FP8_DETAIL, values=0),
    "--use-precision-aware-optimizer": refused("The optimizer keeps float32.", values=0),
    "--grad-reduce-in-bf16": no_effect("Gradients are summed in float32, which is more exact.", values=0),
    # memory
    "--checkpoint-activations": becomes(
        lambda _: {"gradient_checkpointing": "full"}, "It takes no value.", values=0
    ),
    "--recompute-method": choice(
        {"uniform": {}, "block": {}}, "Every layer is recomputed, each by itself: uniform."
    ),
    "--recompute-num-layers": becomes(_recompute_layers, "A number of layers."),
    "--recompute-modules": refused(
        "--recompute-granularity selective recomputes all but attention.",
        values=MANY,
        unless=(None, "core_attn"),
    ),
    "--distribute-saved-activations": no_effect("--sequence-parallel cuts what is kept.", values=0),
    "--cpu-offloading": becomes(lambda _: {"activation_offloading": True}, "It takes no value.", values=0),
    "--cpu-offloading-num-layers": becomes(
        lambda n: {"activation_offloading": bool(int(n) > 0)},
        "All layers offload what backward needs, or none.",
    ),
    "--fine-grained-activation-offloading": becomes(
        lambda _: {"activation_offloading": True}, "It takes no value.", values=0
    ),
    "--offload-modules": refused(
        "--fine-grained-activation-offloading moves what whole layers keep; with --recompute-granularity selective that is less.",
        values=MANY,
    ),
    "--min-offloaded-tensor-size": no_effect("Tensors below 64 KiB stay on the device."),
    "--optimizer-cpu-offload": becomes(lambda _: {"offload_params": True}, "It takes no value.", values=0),
    "--optimizer-offload-fraction": refused(
        "--optimizer-cpu-offload moves all of the optimizer, and weights and gradients with it.",
        unless=(1.0, None),
    ),
    "--use-torch-optimizer-for-cpu-offload": no_effect("The optimizer is PyTorch's, always.", values=0),
    "--overlap-cpu-optimizer-d2h-h2d": no_effect("FSDP2 copies while the device computes.", values=0),
    "--no-pin-cpu-grads": no_effect("Offloaded gradients are pinned on CUDA.", values=0),
    "--no-pin-cpu-params": no_effect("Offloaded weights are pinned on CUDA.", values=0),
    "--empty-unused-memory-level": no_effect("PyTorch's allocator keeps what it has."),
    "--cross-entropy-loss-fusion": no_effect(
        "The loss is fused with the output layer, in chunks, always.", values=0
    ),
    "--cross-entropy-fusion-impl": no_effect("The loss is fused with the output layer, in chunks, always."),
    # data
    "--num-workers": no_effect(_LOADER),
    "--dataloader-type": refused(
        "Samples are shuffled by the seed and never repeated in an epoch.", unless=("single", "cyclic")
    ),
    "--no-create-attention-mask-in-dataloader": no_effect("No mask of size s x s is ever made.", values=0),
    "--create-attention-mask-in-dataloader": refused("No mask of size s x s is ever made.", values=0),
    "--no-mmap-bin-files": no_effect(_MOCK, values=0),
    "--mmap-bin-files": no_effect(_MOCK, values=0),
    "--data-args-path": refused("Give --data-path, or a YAML with datasets."),
    "--per-split-data-args-path": refused("Give --train-data-path, --valid-data-path and --test-data-path."),
    "--data-impl": no_effect(_MOCK),
    "--mid-level-dataset-surplus": no_effect("Samples are looked up, not counted in advance."),
    "--num-dataset-builder-threads": no_effect("Indices are made in seconds."),
    "--full-validation": no_effect(
        "Evaluation takes every held-out sequence, unless --eval-iters says fewer.", values=0
    ),
    "--skip-train": refused("longspan eval evaluates a model.", values=0),
    "--vocab-extra-ids": refused("Add tokens to the tokenizer itself."),
    "--tiktoken-pattern": no_effect("It is for the TikTokenizer."),
    "--legacy-tokenizer": no_effect("Tokenizers are Hugging Face's.", values=0),
    # logging
    "--log-throughput": no_effect(_LOGGED, values=0),
    "--log-timers-to-tensorboard": no_effect(_LOGGED, values=0),
    "--log-batch-size-to-tensorboard": no_effect(_LOGGED, values=0),
    "--log-validation-ppl-to-tensorboard": no_effect(_LOGGED, values=0),
    "--log-memory-to-tensorboard": no_effect(_LOGGED, values=0),
    "--log-num-zeros-in-grad": no_effect(_LOGGED, values=0),
    "--log-loss-scale-to-tensorboard": no_effect(_LOGGED, values=0),
    "--log-learning-rate-to-tensorboard": no_effect(_LOGGED, values=0),
    "--log-world-size-to-tensorboard": no_effect(_LOGGED, values=0),
    "--log-progress": no_effect(_LOGGED, values=0),
    "--timing-log-level": no_effect(_TIMERS),
    "--timing-log-option": no_effect(_TIMERS),
    "--tensorboard-log-interval": no_effect(_LOGGED),
    "--tensorboard-queue-size": no_effect(_LOGGED),
    "--logging-level": no_effect("Progress is printed; records are in metrics.jsonl."),
    "--wandb-save-dir": no_effect("Weights & Biases writes under the output folder."),
    "--one-logger-project": no_effect(_LOGGED),
    "--no-one-logger": no_effect(_LOGGED, values=0),
    "--profile": no_effect(_PROFILE, values=0),
    "--use-pytorch-profiler": no_effect(_PROFILE, values=0),
    "--profile-step-start": no_effect(_PROFILE),
    "--profile-step-end": no_effect(_PROFILE),
    "--profile-ranks": no_effect(_PROFILE, values=MANY),
    "--log-straggler": no_effect(_WATCH, values=0),
    "--disable-straggler-on-startup": no_effect(_WATCH, values=0),
    "--straggler-minmax-count": no_effect(_WATCH),
    "--check-weight-hash-across-dp-replicas-interval": no_effect(
        "Copies of the weights are updated by the same sums; longspan verify compares them with one process."
    ),
    "--train-sync-interval": no_effect("Every step ends with a message of all ranks."),
    "--adlr-autoresume": no_effect("--load with --exit-signal-handler goes on after a stop.", values=0),
    "--enable-ft-package": no_effect(_WATCH, values=0),
    "--barrier-with-L1-time": no_effect(_TIMERS, values=0),
    "--no-barrier-with-level-1-timing": no_effect(_TIMERS, values=0),
    "--enable-one-logger": no_effect(_LOGGED, values=0),
    "--one-logger-run-name": no_effect(_LOGGED),
    "--one-logger-async": no_effect(_LOGGED, values=0),
    # checkpoints
    "--ckpt-format": no_effect(_CHECKPOINT),
    "--dist-ckpt-format": no_effect(_CHECKPOINT),
    "--use-dist-ckpt": no_effect(_CHECKPOINT, values=0),
    "--auto-detect-ckpt-format": no_effect(_CHECKPOINT, values=0),
    "--dist-ckpt-strictness": no_effect("A checkpoint that does not fit is refused before training."),
    "--ckpt-fully-parallel-save": no_effect("Every rank writes its own part.", values=0),
    "--ckpt-fully-parallel-load": no_effect("Every rank reads its own part.", values=0),
    "--ckpt-assume-constant-structure": no_effect(_CHECKPOINT, values=0),
    "--no-save-optim": refused("A checkpoint is whole; --export-hf writes the model alone.", values=0),
    "--no-save-rng": no_effect("A checkpoint is whole; --no-load-rng leaves it out on the way in.", values=0),
    "--use-persistent-ckpt-worker": no_effect("Checkpoints are written in a thread.", values=0),
    "--dist-ckpt-optim-fully-reshardable": no_effect(_CHECKPOINT, values=0),
    "--finetune": becomes(
        lambda _: {"no_load_optim": True, "no_load_rng": True}, "It takes no value.", values=0
    ),
    "--pretrained-checkpoint": refused(
        "It is --base-model FOLDER (Hugging Face), or --load with --finetune."
    ),
    "--ckpt-step": refused("Give the checkpoint itself: --load DIR/checkpoints/step_00000100."),
    "--non-persistent-save-interval": refused("Checkpoints are written in a thread: --save-interval alone."),
    # kernels and machines
    "--cuda-graph-impl": refused("CUDA graphs are not used."),
    "--cuda-graph-scope": no_effect("CUDA graphs are not used."),
    "--external-cuda-graph": refused("CUDA graphs are not used.", values=0),
    "--te-rng-tracker": no_effect("Nothing is drawn at random in a step.", values=0),
    "--enable-cuda-graph": refused("CUDA graphs are not used.", values=0),
    "--use-cpu-initialization": no_effect(
        "Initial weights depend on (seed, name, shape), never on the device.", values=0
    ),
    "--perform-initialization": no_effect("Weights are initialised.", values=0),
    "--no-initialization": refused("Weights are initialised, or read from --base-model.", values=0),
    "--data-parallel-random-init": refused("There is one model, whatever the layout.", values=0),
    "--inference-batch-times-seqlen-threshold": no_effect("It is for inference."),
    "--inference-max-seq-length": no_effect("It is for inference."),
    "--inference-max-requests": no_effect("It is for inference."),
    "--max-tokens-to-oom": no_effect("It is for inference."),
    # other models
    "--untie-embeddings": refused(
        "It is --untie-embeddings-and-output-weights, or tie_word_embeddings: false in a file.", values=0
    ),
    "--encoder-num-layers": refused(_OTHER),
    "--decoder-num-layers": refused(_OTHER),
    "--hybrid-attention-ratio": refused(_OTHER),
    "--mtp-num-layers": refused(_OTHER),
    "--is-hybrid-model": refused(_OTHER, values=0),
}
