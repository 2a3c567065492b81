"""Checkpoints by torch's distributed checkpoint (DCP): whole or absent, loadable at any layout.

``checkpoints/step_00000100/`` is written beside under another name and renamed when it is
whole; ``checkpoints/latest`` is one line with the newest name.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    """Writes model and optimizer; collective. Returns the checkpoint's folder."""
    name = f"step_{step:08d}"
    final, partial = folder / name, folder / f".{name}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state, "step": step}, checkpoint_id=str(partial))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        write_atomically(folder / "latest", name + "\n")
    dist.barrier()
    return final


def write_atomically(path: Path, text: str) -> None:
    """Writes a small text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
