"""The lines that a run prints at its start (what will run, in about ten lines) and at its end (results)."""

from __future__ import annotations

from pathlib import Path

import torch

from longspan.config.data import keeps_documents_apart
from longspan.config.experts import experts_line
from longspan.config.families.hub import model_config
from longspan.config.recurrent import recurrent_line
from longspan.config.run import Run
from longspan.config.stages import pipeline_line
from longspan.context_parallel.kernels.choose import select_kernel
from longspan.context_parallel.run_layout import run_layout
from longspan.recurrent.kernels.choose import kernels_line, select_kernels
from longspan.training.lock import CONFIG
from longspan.training.progress import loss_text
from longspan.training.schedule import learning_rate
from longspan.training.sinks import tensorboard_folder
from longspan.training.trainer import Trainer


def banner(run: Run, *, parameters: int, trained: int, samples: int, held_out: int, tested: int, steps: int, warmup: int,
           device: torch.device, local_rows: int, filling: str, learned: str, output: Path) -> str:  # fmt: skip
    """The lines that rank 0 prints before the first step.

    Args:
        parameters: number of parameters of the whole model, vocabulary padding included.
        trained: number of parameters that are trained.
        samples, held_out, tested: numbers of sequences of an epoch, held out, and for the test at the end.
        local_rows: number of tokens of a sequence on one rank, padding included.
        filling: text on what a sequence is made of.
        learned: text on the numbers of samples and of learned tokens.
    """
    c, sizes, model, batch, precision = run.config, run.sizes, run.model, run.batch, run.precision
    kernel, reason = select_kernel(
        device,
        getattr(torch, precision.compute_dtype),
        model.kv_channels,
        c.attention_backend,
        c.deterministic_mode,
    )
    layout: str = c.cp_layout
    if model.recurrent:
        layout = "contiguous"
        if run.attention_layers and sizes.cp > 1:
            layout += f", attention {c.attention_cp_layout}"
    elif layout == "auto":
        plain = run_layout(run, batch.sequence_len).name
        layout = "balanced where documents are uneven" if keeps_documents_apart(c) else plain
    moves = c.cp_comm_type if isinstance(c.cp_comm_type, str) else "/".join(c.cp_comm_type)
    epochs = steps * batch.global_size / samples
    on = {True: "on", False: "off"}
    rows = {
        "model": f"{parameters / 1e6:,.1f}M parameters: {model.num_layers} layers, hidden {model.hidden_size}, "
        f"{model.num_attention_heads} heads ({model.num_query_groups} key/value), vocabulary {run.vocab_size}",
        **({"computed by": f"transformers' own class ({class_name(run)})"} if run.by_class else {}),
        **({"mixers": recurrent_line(model)} if model.recurrent else {}),
        **(
            {
                "adapters": f"LoRA rank {run.lora.rank}, scale {run.lora.scale:g}, on {', '.join(run.lora.targets)}: "
                f"{trained:,} of {parameters:,} parameters trained ({100 * trained / parameters:.2g} %)"
            }
            if run.lora is not None
            else {}
        ),
        "mesh": f"{sizes.equation()} processes on {device.type}",
        "batch": batch.equation(sizes.dp),
        "sequence": f"{batch.sequence_len:,} tokens, "
        + (
            f"at most {local_rows:,} of a micro-batch on each of {sizes.dp * sizes.cp} ranks (hybrid, {moves})"
            if c.hybrid_context_parallel
            else f"{local_rows:,} on each of {sizes.cp} context parallel ranks ({layout}, {moves})"
        )
        + f"; sequence parallelism {on[run.sequence_parallel]}; "
        + filling,
        "samples": learned,
        "attention": f"{kernel.name} on {device.type}, {precision.compute_dtype} ({reason})",
        **({"recurrent": _recurrent_line(run, device)} if model.recurrent else {}),
        "precision": f"compute {precision.compute_dtype}, weights and optimizer {precision.params_dtype}"
        + ("; TensorFloat-32" if precision.tf32 and device.type == "cuda" else "")
        + ("; frozen weights bfloat16" if run.lora is not None and precision.mixed else ""),
        "memory": "; ".join(memory_lines(run, device.type)),
        "steps": f"{steps} ({epochs:.2f} epochs of {samples} sequences), {warmup} of warm-up, "
        f"{c.lr_scheduler} from {c.learning_rate:g}{_without_effect(run, steps, warmup)}",
        "loss": "mean over all valid tokens of the global batch, at every layout"
        + (f"; {held_out} sequences held out" if held_out else "")
        + (f", {tested} for the test at the end" if tested else ""),
        "output": f"{output}: metrics.jsonl, config.yaml"
        + (", tensorboard/" if c.use_tensorboard else "")
        + (", checkpoints/" if c.save_last or c.save_steps else ""),
    }
    schedule = run.config.pipeline_schedule
    if schedule is not None:
        line = pipeline_line(run.stages, run.sizes.pp, schedule, run.batch.accumulation)
        rows = {**{name: rows[name] for name in ("model", "mesh")}, "pipeline": line, **rows}
    if run.model.num_moe_experts is not None:
        rows = {
            **{name: rows[name] for name in ("model", "mesh")},
            "experts": experts_line(run.model, run.sizes, run.config.base_model is not None),
            **rows,
        }
    width = max(map(len, rows))
    return "\n".join(["longspan", *(f"  {name:<{width}}  {text}" for name, text in rows.items())])


def class_name(run: Run) -> str:
    """The name of transformers' class of a run's base model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert run.config.base_model is not None
    kind = model_config(run.config.base_model)[0]["model_type"]
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]


def _recurrent_line(run: Run, device: torch.device) -> str:
    """What computes the recurrent layers, and why."""
    c, dtype = run.config, run.precision.compute_dtype
    choices = select_kernels(
        run.model,
        device,
        getattr(torch, dtype),
        c.recurrent_backend,
        c.deterministic_mode,
        run.sizes.tp,
    )
    return kernels_line(choices, device, dtype)


def memory_lines(run: Run, device_type: str) -> list[str]:
    """The effects of the memory keys on a device, for the banner.

    On the CPU nothing can be moved to the CPU's memory. The banner mentions this, and the run is not refused,
    so that a config made for GPUs runs there unchanged, with the same numbers.
    """
    memory = run.memory
    lines = [f"recompute {memory.recompute}"]
    if run.config.tiled_mlp:
        tiles = memory.mlp_tiles
        lines[0] += f"; MLP in {tiles if tiles else 'tokens / hidden_size'} tiles"
    if memory.torch_compile:
        lines.append("compiled between the exchanges")
    if device_type != "cpu":
        moved = {"activations": memory.activation_offloading, "weights and optimizer": memory.offload_params}
        lines += [f"{name} in the CPU's memory" for name, on in moved.items() if on]
        return lines
    asked = {
        "gradient_checkpointing: offload (it is full)": memory.recompute == "offload",
        "activation_offloading": memory.activation_offloading,
        "offload_params": memory.offload_params,
        "tf32": run.precision.tf32,
    }
    if idle := [name for name, on in asked.items() if on]:
        lines.append(f"without effect on the CPU: {', '.join(idle)}")
    return lines


def _without_effect(run: Run, steps: int, warmup: int) -> str:
    """A note on learning rates that change nothing or never reach their peak; empty for other rates."""
    if not any(learning_rate(run.config, step, steps, warmup) for step in range(1, min(2, steps) + 1)):
        why = ": the only step is the first of the warm-up" if warmup and run.config.learning_rate else ""
        return f"; WARNING: the learning rate is 0 in every step{why}, so this run changes nothing"
    return f"; all warm-up, which would reach its peak after {warmup} steps" if warmup >= steps else ""


def megatron_line(run: Run) -> str:
    """The line of sizes that Megatron-LM prints first."""
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


def start_lines(trainer: Trainer, output: Path) -> str:
    parameters, trained = trainer.parameter_counts
    first = megatron_line(trainer.run) + "\n" if trainer.run.config.log_format == "megatron" else ""
    return first + banner(
        trainer.run,
        parameters=parameters,
        trained=trained,
        samples=len(trainer.train_data),
        held_out=len(trainer.valid_data) if trainer.valid_data else 0,
        tested=len(trainer.test_data) if trainer.test_data else 0,
        steps=trainer.steps,
        warmup=trainer.warmup,
        device=trainer.device,
        local_rows=trainer.shard.local_rows(),
        filling=filling(trainer),
        learned=learned(trainer),
        output=output,
    )


def filling(trainer: Trainer) -> str:
    """A text on what a sequence is made of, and on samples that were too long."""
    data, config = trainer.train_data, trainer.run.config
    what = "samples and documents" if None in data.masks else "samples"
    if not data.has_samples:
        if config.sample_packing:
            return "documents packed and kept apart"
        begins = {"positions": config.reset_position_ids, "attention": config.reset_attention_mask}
        anew = " and ".join(name for name, on in begins.items() if on)
        return "one stream of documents" + (f", {anew} anew after each end of document" if anew else "")
    text = f"{what} packed and kept apart" if config.sample_packing else "one sample each"
    if not (excess := data.num_excess):
        return text
    done = "dropped" if config.excess_length_strategy == "drop" else "truncated"
    return f"{text}; {excess:,} of {data.num_documents + excess * (done == 'dropped'):,} samples were too long and are {done}"


def learned(trainer: Trainer) -> str:
    """A text on the numbers of samples and of learned tokens in the training data."""
    data = trainer.train_data
    what = "samples" if data.has_samples and None not in data.masks else "documents"
    what = "samples and documents" if data.has_samples and None in data.masks else what
    return f"{data.num_documents:,} {what}, {data.num_learned:,} of {data.num_tokens:,} tokens learned"


def last_lines(summary: dict, trainer: Trainer, output: Path, exported: bool) -> str:
    """The lines at the end of a run: the results, where the files are, and what to try next."""
    config = trainer.run.config
    stopped = trainer.step < trainer.steps
    loss = f"loss: {loss_text(summary['loss'])} in the last step"
    if summary["eval_loss"] is not None:
        loss += f", {summary['eval_loss']:.4f} held out"
    where = f"metrics: {output / 'metrics.jsonl'}"
    if exported:
        what = (
            "model: {}, for Hugging Face transformers"
            if trainer.run.lora is None
            else "adapters: {}, for PEFT"
        )
        where = f"{what.format(output / 'hf')}\n{where}"
    if config.use_tensorboard:
        where += f"   curves: tensorboard --logdir {tensorboard_folder(trainer.run, output)}"
    return "\n".join(
        [
            "",
            f"{'stopped' if stopped else 'done'}: {summary['step']} steps, {summary['tokens']:,} tokens in "
            f"{summary['train_time']:.0f} s ({summary['tokens_per_second']:,.0f} tokens/s), peak "
            f"{summary['peak_memory_gib']:.2f} GiB a rank",
            loss,
            where,
            *(
                [f"next: the same command with --resume auto goes on from step {summary['step']}"]
                if stopped
                else [
                    "next: --context-parallel-size 4 cuts each sequence over more ranks and gives the same losses;",
                    f"      longspan verify {output / CONFIG} shows that they are",
                    *(
                        [f"      longspan generate {output / 'hf'} lets the model write"]
                        if exported and not trainer.run.by_class
                        else []
                    ),
                ]
            ),
        ]
    )
