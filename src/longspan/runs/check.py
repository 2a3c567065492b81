"""Checks every rule of a config, and fills in the device and the arithmetic."""

from __future__ import annotations

import os
import sys

from longspan.config.families.hub import unused_fields
from longspan.config.load import Reading
from longspan.config.resolve import compiles, resolve
from longspan.config.run import Checked
from longspan.data.checks import missing_sources
from longspan.errors import UserError
from longspan.runs.environment import without_effect
from longspan.runs.start import Launch, choose_device, under_torchrun


def checked(reading: Reading, launch: Launch, announce: str = "") -> tuple[Checked, Launch]:
    """Checks every rule of the config that was read, and fills in the device and the arithmetic.

    The first rank prints the settings that have no effect on this run.

    Args:
        announce: text to print before them if all rules hold.

    Returns:
        The checked config, and ``launch`` unchanged.

    Raises:
        UserError: rules are broken, with all problems at once; or a backend of attention or of recurrent layers
            cannot serve the run.
    """
    config, problems, bad = reading.config, reading.problems, reading.bad
    assert config is not None
    world = launch.processes
    try:
        device, world = choose_device(config, launch)
    except UserError as error:
        problems += error.problems
        device = "cpu"
    compiler = has_compiler(reading, device)
    problems += missing_sources(config) if "datasets" not in bad else []
    run = resolve(config, world, device=device, compiler=compiler, bad_keys=bad, earlier=problems)
    if config.base_model is not None and config.rope_scaling is None:
        reading.notes += unused_fields(config.base_model, run.config.model_implementation)
    found = [*reading.notes, *without_effect(os.environ, device, joined=under_torchrun())]
    notes = ["without effect here:", *(f"  {note}" for note in found)] if found else []
    if (notes or announce) and os.environ.get("RANK", "0") == "0":
        print("\n".join([announce, *notes] if announce else notes), file=sys.stderr)
    if config.attention_backend != "auto":
        check_backend(run)
    if config.recurrent_backend != "auto":
        check_recurrent_backend(run)
    return run, launch


def has_compiler(reading: Reading, device: str) -> bool:
    """Whether this machine compiles for the device, if the config asks for it.

    Where it cannot, ``torch_compile: true`` is a problem of what was read, and ``auto`` a note.
    """
    config = reading.config
    assert config is not None
    if not compiles(config, device):
        return True
    import torch

    from longspan.compiled import check_compiler

    try:
        check_compiler(torch.device(device))
    except UserError as error:
        if config.torch_compile is True:
            reading.problems += error.problems
        else:
            reading.notes.append(f"torch_compile: auto compiles nothing on this machine: {error}")
        return False
    return True


def check_backend(run: Checked) -> None:
    """Raises a UserError if the attention backend cannot serve this run."""
    import torch

    from longspan.context_parallel.kernels.choose import select_kernel

    select_kernel(
        torch.device(run.device),
        getattr(torch, run.precision.compute_dtype),
        run.model.kv_channels,
        run.config.attention_backend,
        run.config.deterministic_mode,
    )


def check_recurrent_backend(run: Checked) -> None:
    """Raises a UserError if the backend of recurrent layers cannot serve this run."""
    import torch

    from longspan.recurrent.kernels.choose import select_kernels

    dtype = getattr(torch, run.precision.compute_dtype)
    backend, deterministic = run.config.recurrent_backend, run.config.deterministic_mode
    select_kernels(run.model, torch.device(run.device), dtype, backend, deterministic, run.sizes.tp)
