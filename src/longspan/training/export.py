"""A trained model as a Hugging Face folder: weights, config, tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longspan.config.architecture import model_config
from longspan.config.hugging_face import hugging_face_config
from longspan.config.resolve import Run, architecture
from longspan.models.huggingface import FolderWriter, Names, whole_parameters
from longspan.training.adapters import export_adapters
from longspan.training.loop import Trainer


def export_dtype(run: Run, base: dict[str, Any] | None) -> torch.dtype:
    """``export_dtype: auto`` is base_model's, else what was computed in, at most float32."""
    config = run.config
    if config.export_dtype != "auto":
        return getattr(torch, config.export_dtype)
    if base is not None:
        return getattr(torch, base.get("torch_dtype") or base.get("dtype") or "float32")
    return torch.bfloat16 if config.bf16 is True else torch.float32


def export(trainer: Trainer, folder: Path) -> None:
    """Writes the model, or the adapters of a run that trains those; collective. The folder is whole or as it was."""
    run = trainer.run
    if run.lora is not None:
        export_adapters(trainer.model, run, folder)
        return
    base = None if run.config.base_model is None else model_config(run.config.base_model)[0]
    dtype = export_dtype(run, base)
    assert run.config.vocab_size is not None
    names = Names(trainer.model.config, run.config.vocab_size)
    writer = FolderWriter(folder, names, dtype) if dist.get_rank() == 0 else None
    for name, whole in whole_parameters(trainer.model):
        if writer is not None:
            writer.add(name, whole)
    if writer is not None:
        tokenizer = run.config.tokenizer_config
        name = str(dtype).removeprefix("torch.")
        writer.finish(
            hugging_face_config(architecture(run.config), name, base), Path(tokenizer) if tokenizer else None
        )
    dist.barrier()
