"""A config with every rule checked, and the device and the arithmetic filled in."""

from __future__ import annotations

import os
import sys

from longspan.config.hub import unused_fields
from longspan.config.load import Reading
from longspan.config.resolve import Run, resolve
from longspan.data.checks import missing_sources
from longspan.errors import UserError
from longspan.runs.environment import without_effect
from longspan.runs.start import Launch, choose_device, under_torchrun


def checked(reading: Reading, launch: Launch, announce: str = "") -> tuple[Run, Launch, str]:
    """What was read with every rule checked, and the device and the arithmetic filled in; says what has no effect.

    Args:
        announce: is said too, when all is well.

    Raises:
        UserError: with all problems at once.
    """
    config, problems, bad = reading.config, reading.problems, reading.bad
    assert config is not None
    world = launch.processes
    try:
        device, world = choose_device(config, launch)
    except UserError as error:
        problems += error.problems
        device = "cpu"
    problems += missing_sources(config) if "datasets" not in bad else []
    resolved = resolve(config, world, bad_keys=bad, earlier=problems)
    if config.base_model is not None and config.rope_scaling is None:
        reading.notes += unused_fields(config.base_model)
    bf16 = device == "cuda" and config.params_dtype == "float32" if config.bf16 == "auto" else config.bf16
    compiled = config.torch_compile
    if compiled == "auto":
        compiled = device == "cuda" and not config.deterministic_mode
    if compiled:
        import torch

        from longspan.compiled import check_compiler

        try:
            check_compiler(torch.device(device))
        except UserError as error:
            if config.torch_compile is True:
                raise
            compiled = False
            reading.notes.append(f"torch_compile: auto compiles nothing on this machine: {error}")
    final = resolved.config.model_copy(
        update={
            "device": device,
            "bf16": bf16,
            "torch_compile": compiled,
            "micro_batch_size": resolved.micro_batch_size,
            "gradient_accumulation_steps": resolved.accumulation,
            "global_batch_size": resolved.global_batch_size,
            "dp_shard_size": resolved.sizes.dp_shard,
            # off is off; without tensor parallelism the key has nothing to say
            "sequence_parallel": resolved.sequence_parallel if resolved.sizes.tp > 1 else None,
        }
    )
    final_run = resolve(final, resolved.world_size)
    found = [*reading.notes, *without_effect(os.environ, device, joined=under_torchrun())]
    notes = ["without effect here:", *(f"  {note}" for note in found)] if found else []
    if (notes or announce) and os.environ.get("RANK", "0") == "0":
        print("\n".join([announce, *notes] if announce else notes), file=sys.stderr)
    if final.attention_backend != "auto":
        check_backend(final_run, device)
    return final_run, launch, device


def check_backend(run: Run, device: str) -> None:
    """Refuses an attention backend that cannot serve this run (UserError)."""
    import torch

    from longspan.context_parallel.kernels.choose import select_kernel

    dtype = torch.bfloat16 if run.config.bf16 is True else getattr(torch, run.config.params_dtype)
    head_dim = run.transformer_config().kv_channels
    select_kernel(
        torch.device(device), dtype, head_dim, run.config.attention_backend, run.config.deterministic_mode
    )
