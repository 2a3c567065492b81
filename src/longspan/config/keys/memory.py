"""Precision, kernels, and what is kept in memory."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from longspan.config.keys.declare import key


class MemoryKeys(BaseModel):
    """Precision, kernels, and what is kept in memory."""

    device: Literal["auto", "cpu", "cuda"] = key(
        "auto",
        "auto takes CUDA where there are as many GPUs as local processes.",
    )
    bf16: Literal["auto"] | bool = key(
        "auto",
        "Compute in bfloat16; weights, optimizer and reductions stay float32. auto: on CUDA.",
        megatron_default=False,
    )
    params_dtype: Literal["float32", "float64"] = key(
        "float32", "Of weights and optimizer; float64 is for checking."
    )
    tf32: Literal["auto"] | bool = key(
        "auto", "float32 products on CUDA in TensorFloat-32; auto: no, since bf16 is what computes fast."
    )
    gradient_checkpointing: bool | Literal["full", "selective", "offload"] = key(
        False,
        "Recompute activations in backward: full (true) keeps a layer's input, selective also what attention needs; "
        "offload: full, with the inputs kept in the CPU's memory (CUDA).",
        flag="--recompute-granularity",
        switches={"--recompute-activations": "selective", "--ckpt-activations": "full"},
    )
    reshard_after_forward: bool = key(
        True,
        "Free a layer's gathered weights after its forward pass.",
        aliases=("fsdp_config.reshard_after_forward",),
    )
    activation_offloading: bool = key(
        False, "Keep what the layers save for backward in the CPU's memory (CUDA)."
    )
    offload_params: bool = key(
        False,
        "Keep weights, gradients and optimizer in the CPU's memory, and update there (FSDP2's CPUOffloadPolicy).",
        aliases=("fsdp_config.offload_params",),
    )
    tiled_mlp: bool = key(
        False, "Compute the MLP a tile of tokens at a time, forward and backward, to save its activations."
    )
    tiled_mlp_num_shards: int | None = key(
        None, "Tiles of a rank's tokens; default: tokens / hidden_size, rounded up.", unit="tiles", gt=0
    )
    torch_compile: Literal["auto"] | bool = key(
        False,
        "Compile what lies between the exchanges (norms, projections, rotary, MLP, loss), once for all layers; the first step "
        "waits for it. auto: on CUDA, unless deterministic_mode.",
    )
    attention_backend: Literal[
        "auto", "flash-attn-3", "flash-attn-2", "cuda-flash", "cudnn", "cpu-blocks", "cpu-flash", "math"
    ] = key("auto", "Kernel of one tile of attention.")
    recurrent_backend: Literal["auto", "torch", "mamba-ssm", "fla"] = key(
        "auto",
        "Scan of recurrent layers: torch (plain PyTorch), mamba-ssm (that package, Mamba-2), fla (flash-linear-attention, gated "
        "delta rule), or auto: on CUDA the packages that are installed and support the run, else torch.",
    )
    deterministic_mode: bool = key(
        False,
        "Two runs give equal bits on CUDA too (on CPU they always do).",
    )
