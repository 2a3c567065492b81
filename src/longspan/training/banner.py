"""The start-up banner: what will run, in about ten lines."""

from __future__ import annotations

from pathlib import Path

import torch

from longspan.config.data_rules import keeps_documents_apart
from longspan.config.memory_rules import memory_lines
from longspan.config.resolve import Run
from longspan.config.schedule import learning_rate
from longspan.context_parallel import SequenceLayout
from longspan.context_parallel.kernels import select_kernel


def banner(run: Run, *, parameters: int, trained: int, samples: int, held_out: int, tested: int, steps: int, warmup: int,
           device: torch.device, local_rows: int, filling: str, learned: str, output: Path) -> str:  # fmt: skip
    """The lines rank 0 prints before the first step.

    Args:
        parameters: of the whole model, vocabulary padding included; trained: those that change.
        samples, held_out, tested: sequences an epoch, of an evaluation, and of the test at the end.
        local_rows: tokens of a sequence on one rank, padding included.
        filling: what a sequence is made of.
        learned: how many samples there are, and how many of their tokens are learned.
    """
    c, sizes = run.config, run.sizes
    dtype = torch.bfloat16 if c.bf16 is True else getattr(torch, c.params_dtype)
    model = run.transformer_config()
    kernel, reason = select_kernel(
        device, dtype, model.kv_channels, c.attention_backend, c.deterministic_mode
    )
    tokens = run.global_batch_size * c.sequence_len
    layout: str = c.cp_layout
    if layout == "auto":
        plain = SequenceLayout.make(layout, c.sequence_len, sizes.cp, windows=run.windows)
        layout = "balanced where documents are uneven" if keeps_documents_apart(c) else plain.name
    moves = c.cp_comm_type if isinstance(c.cp_comm_type, str) else "/".join(c.cp_comm_type)
    epochs = steps * run.global_batch_size / samples
    on = {True: "on", False: "off"}
    rows = {
        "model": f"{parameters / 1e6:,.1f}M parameters: {model.num_layers} layers, hidden {model.hidden_size}, "
        f"{model.num_attention_heads} heads ({model.num_query_groups} key/value), vocabulary {c.vocab_size}",
        **(
            {
                "adapters": f"LoRA rank {run.lora.rank}, scale {run.lora.scale:g}, on {', '.join(run.lora.targets)}: "
                f"{trained:,} of {parameters:,} parameters trained ({100 * trained / parameters:.2g} %)"
            }
            if run.lora is not None
            else {}
        ),
        "mesh": f"{sizes.equation()} processes on {device.type}",
        "batch": f"micro {run.micro_batch_size} x accumulation {run.accumulation} x dp {sizes.dp} = "
        f"{run.global_batch_size} sequences = {tokens:,} tokens a step",
        "sequence": f"{c.sequence_len:,} tokens, "
        + (
            f"at most {local_rows:,} of a micro-batch on each of {sizes.dp * sizes.cp} ranks (hybrid, {moves})"
            if c.hybrid_context_parallel
            else f"{local_rows:,} on each of {sizes.cp} context parallel ranks ({layout}, {moves})"
        )
        + f"; sequence parallelism {on[run.sequence_parallel]}; "
        + filling,
        "samples": learned,
        "attention": f"{kernel.name} on {device.type}, {str(dtype).removeprefix('torch.')} ({reason})",
        "precision": f"compute {str(dtype).removeprefix('torch.')}, weights and optimizer {c.params_dtype}"
        + ("; TensorFloat-32" if c.tf32 is True and device.type == "cuda" else "")
        + ("; frozen weights bfloat16" if run.lora is not None and c.bf16 is True else ""),
        "memory": "; ".join(memory_lines(c, run.recompute, device.type)),
        "steps": f"{steps} ({epochs:.2f} epochs of {samples} sequences), {warmup} of warm-up, "
        f"{c.lr_scheduler} from {c.learning_rate:g}{_without_effect(run, steps, warmup)}",
        "loss": "mean over all valid tokens of the global batch, at every layout"
        + (f"; {held_out} sequences held out" if held_out else "")
        + (f", {tested} for the test at the end" if tested else ""),
        "output": f"{output}: metrics.jsonl, config.yaml"
        + (", tensorboard/" if c.use_tensorboard else "")
        + (", checkpoints/" if c.save_last or c.save_steps else ""),
    }
    width = max(map(len, rows))
    return "\n".join(["longspan", *(f"  {name:<{width}}  {text}" for name, text in rows.items())])


def _without_effect(run: Run, steps: int, warmup: int) -> str:
    """What is odd about a schedule: rates that change nothing, or a peak that is never reached."""
    if not any(learning_rate(run.config, step, steps, warmup) for step in range(1, min(2, steps) + 1)):
        why = ": the only step is the first of the warm-up" if warmup and run.config.learning_rate else ""
        return f"; WARNING: the learning rate is 0 in every step{why}, so this run changes nothing"
    return f"; all warm-up, which would reach its peak after {warmup} steps" if warmup >= steps else ""


def megatron_line(run: Run) -> str:
    """The sizes as Megatron-LM prints them first."""
    sizes = run.sizes
    levels = (
        f"hierarchical context-parallel sizes: {list(sizes.hierarchical_cp)}, "
        if sizes.hierarchical_cp
        else ""
    )
    return (
        f"using world size: {sizes.world_size}, data-parallel size: {sizes.dp}, context-parallel size: {sizes.cp}, "
        f"{levels}tensor-model-parallel size: {sizes.tp}, pipeline-model-parallel size: {sizes.pp}"
    )
