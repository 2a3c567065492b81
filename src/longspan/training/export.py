"""A trained model as a Hugging Face folder: weights, config, tokenizer."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longspan.config.families.hub import model_config, model_folder
from longspan.config.lora import ALL_LINEAR, Lora
from longspan.config.run import Run
from longspan.errors import UserError
from longspan.models.hf_weights import (
    WEIGHT_DTYPES,
    FolderWriter,
    Names,
    SafetensorsFolder,
    whole_parameters,
)
from longspan.models.peft import write_folder
from longspan.training.adapters import export_adapters
from longspan.training.lock import unwritable
from longspan.training.model_files import Files, files_beside
from longspan.training.trainer import Trainer


def export_dtype(run: Run, base: dict[str, Any] | None) -> torch.dtype:
    """The dtype of exported weights: with ``export_dtype: auto`` base_model's, or else that of the
    computation, at most float32.

    Args:
        base: base_model's config.json.

    Raises:
        UserError: base_model's config.json names a dtype that cannot be written.
    """
    config = run.config
    if config.export_dtype != "auto":
        return getattr(torch, config.export_dtype)
    if run.lora is not None:
        # Adapters are small and are trained in float32.
        return torch.float32
    said = None if base is None else base.get("torch_dtype") or base.get("dtype")
    if said in (None, "auto"):
        if run.pretrained is not None:
            return SafetensorsFolder(model_folder(run.pretrained)).dtype
        return torch.bfloat16 if run.precision.compute_dtype == "bfloat16" else torch.float32
    name = said.removeprefix("torch.") if isinstance(said, str) else None
    dtype = next((d for d in WEIGHT_DTYPES.values() if str(d) == f"torch.{name}"), None)
    if dtype is None:
        raise UserError(
            f"export_dtype: auto takes base_model's dtype, and its config.json says {said!r}, in which no weights are written. "
            "Give export_dtype: bfloat16 or float32 (or export_hf: false)."
        )
    return dtype


def prepare_export(run: Run) -> tuple[torch.dtype, Files]:
    """All that an export needs except the trained weights: their dtype, and the files beside them.

    Raises:
        UserError: something is missing or cannot be read.
    """
    base = None if run.config.base_model is None else model_config(run.config.base_model)[0]
    dtype = export_dtype(run, base)
    return dtype, files_beside(run, str(dtype).removeprefix("torch."))


def check_export(run: Run) -> None:
    """Refuses, before the first step, a run whose export would fail at the end.

    Raises:
        UserError: the dtype, a file of base_model or the tokenizer, or the output folder cannot be used.
    """
    output = Path(run.config.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise unwritable(output, error) from None
    if run.config.export_hf:
        prepare_export(run)


def export(trainer: Trainer, folder: Path, prepared: tuple[torch.dtype, Files] | None = None) -> None:
    """Writes the model or, if the run trains adapters, those; collective. The folder is never half written.

    Args:
        prepared: on the first rank, the result of ``prepare_export`` at the run's start; None makes it now.
    """
    run = trainer.run
    first = dist.get_rank() == 0
    dtype, files = (prepared or prepare_export(run)) if first else (torch.float32, {})
    if run.by_class and run.lora is not None:
        _export_class_adapters(trainer, run.lora, folder, dtype, files)
        return
    if run.lora is not None and run.pretrained is not None:
        names = Names(run.model, run.vocab_size, model_config(run.pretrained)[0].get("model_type"))
        config = run.lora.peft_config(run.pretrained, names.family.adapter_modules)
        export_adapters(trainer.model, names, config, folder, dtype, files)
        return
    if run.by_class:
        _export_class(trainer, folder, dtype, files)
        return
    writer = None
    if first:
        names = Names(run.model, run.vocab_size, json.loads(files["config.json"])["model_type"])
        writer = FolderWriter(folder, names, dtype)
    for name, whole in whole_parameters(trainer.model):
        if writer is not None:
            writer.add(name, whole)
    if writer is not None:
        writer.finish(files)
    dist.barrier()


def _export_class(trainer: Trainer, folder: Path, dtype: torch.dtype, files: Files) -> None:
    """Writes a model of transformers' class under the names that the class itself saves; collective."""
    from longspan.training.class_weights import whole_for_files

    writer = FolderWriter(folder, None, dtype) if dist.get_rank() == 0 else None
    for name, whole in whole_for_files(trainer.model.hf):
        if writer is not None:
            writer.keep(name, whole)
    if writer is not None:
        writer.finish(files)
    dist.barrier()


def _export_class_adapters(
    trainer: Trainer, lora: Lora, folder: Path, dtype: torch.dtype, files: Files
) -> None:
    """Writes PEFT's adapters on a model of transformers' class; collective."""
    from longspan.training.class_weights import is_adapter

    weights = {
        "base_model.model." + name.removeprefix("hf.").replace(".default.", "."): whole.to(dtype)
        for name, whole in whole_parameters(trainer.model, only=is_adapter)
    }
    if dist.get_rank() == 0:
        assert trainer.run.pretrained is not None
        config = lora.peft_config(trainer.run.pretrained)
        if ALL_LINEAR in lora.targets:
            config["target_modules"] = ALL_LINEAR
        write_folder(folder, weights, config, files)
    dist.barrier()
