"""Converts between checkpoints and Hugging Face folders, and merges adapters into their base model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from longspan import __version__
from longspan.config.schema import TrainConfig
from longspan.config.yaml_file import read_yaml
from longspan.errors import UserError
from longspan.files import begin_folder, name_folder
from longspan.training.lock import CONFIG

if TYPE_CHECKING:
    import torch


def holds_tokenizer(path: Path) -> bool:
    """Whether this is a tokenizer.json, or a folder with one."""
    return (path.is_file() and path.name == "tokenizer.json") or (path / "tokenizer.json").is_file()


def config_of(path: Path) -> TrainConfig | None:
    """The config of the run to which a checkpoint belongs; None if it is absent.

    A config that cannot be read gives None too, after a line on stderr.

    Args:
        path: the checkpoint's own folder.
    """
    from longspan.config.load import load_config

    config = path.parent.parent / CONFIG
    try:
        return load_config(config) if config.is_file() else None
    except UserError as error:
        print(f"{config}: left out, with the base model it names ({error.problems[0]})", file=sys.stderr)
        return None


def tokenizer_of(path: Path) -> Path | None:
    """The tokenizer that a checkpoint's run names, or else the exported one; None if neither exists.

    Args:
        path: the checkpoint's own folder.
    """
    run = path.parent.parent
    config = run / CONFIG
    named = read_yaml(config).get("tokenizer_config") if config.is_file() else None
    return next((p for p in (Path(named or run / "hf"), run / "hf") if _is_tokenizer(p)), None)


def _is_tokenizer(path: Path) -> bool:
    return path.is_file() or holds_tokenizer(path)


def to_hugging_face(path: Path, output: Path, tokenizer: Path | None, dtype: str) -> None:
    """Writes a checkpoint as a Hugging Face folder, tensor by tensor; adapters as a folder for PEFT.

    Args:
        path: the checkpoint's own folder (``checkpoint.find``).
        dtype: dtype of the written weights, such as ``bfloat16``.

    Raises:
        UserError: the checkpoint's files are damaged, or do not hold the model that its description names; or
            such a model cannot be exported.
    """
    import torch
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from longspan.config.architecture import Architecture
    from longspan.config.families.config_json import export_problem
    from longspan.config.families.hub import model_config
    from longspan.config.lora import Lora
    from longspan.models.hf_weights import FolderWriter, Names
    from longspan.models.peft import is_adapter, write_adapters
    from longspan.training import checkpoint
    from longspan.training.checkpoint_files import read_tensors
    from longspan.training.description import config_of_model, refuse_class
    from longspan.training.model_files import files_of_adapters, files_of_run

    run = config_of(path)
    said = checkpoint.describe(path, "--checkpoint")
    run = run or TrainConfig.model_validate({"base_model": said.get("base_model")})
    resumed = "Resume it with export_hf: true: its run writes OUTPUT_DIR/hf."
    refuse_class(said, path, resumed)
    described = config_of_model(said)
    model = Architecture.of(described)
    if problem := export_problem(model):
        raise UserError(f"--checkpoint {path}: {problem}")
    metadata = checkpoint.verify(path, option="--checkpoint")
    entries = metadata.state_dict_metadata

    def whole(name: str) -> torch.Tensor:
        about = entries.get(f"model.{name}")
        if not isinstance(about, TensorStorageMetadata):
            raise UserError(
                f"--checkpoint {path}: {checkpoint.DESCRIPTION} describes a model with {name}, and there are no such weights. "
                "Use another checkpoint."
            )
        state = {"model": {name: torch.empty(about.size, dtype=about.properties.dtype)}}
        read_tensors(path, state, metadata, "--checkpoint", no_dist=True)
        return state["model"][name]

    if (adapter := said.get("adapter")) is not None:
        held = [name.removeprefix("model.") for name in entries if name.startswith("model.")]
        # Buffers, such as the counters of a router, are no adapters.
        weights = {name: whole(name).to(getattr(torch, dtype)) for name in held if is_adapter(name)}
        lora = Lora(adapter["rank"], adapter["alpha"], tuple(adapter["targets"]), adapter["rslora"])
        run = at_hand(run.model_copy(update={"base_model": adapter["base_model"]}))
        files = files_of_adapters(run, tokenizer)
        base = adapter["base_model"]
        names = Names(model, said["model"]["vocab_size"], model_config(base)[0].get("model_type"))
        config = lora.peft_config(base, names.family.adapter_modules)
        write_adapters(output, names, weights, config, files)
        return
    files = files_of_run(at_hand(run), described, dtype, tokenizer)
    vocab = said["model"]["vocab_size"]
    names = Names(model, vocab, json.loads(files["config.json"])["model_type"])
    writer = FolderWriter(output, names, getattr(torch, dtype))
    for name in names.shapes():
        writer.add(name, whole(name))
    writer.finish(files)


def at_hand(config: TrainConfig) -> TrainConfig:
    """A run's config, without a base_model that is no longer there; prints what the export then lacks."""
    from longspan.training.model_files import origin_of

    if config.base_model is None or config.reinit_weights:
        return config
    try:
        here = origin_of(config.base_model).folder is not None
    except UserError:
        here = False
    if here:
        return config
    text = f"base_model {config.base_model} is not here: its sampling settings and further end tokens are left out."
    print(text, file=sys.stderr)
    return config.model_copy(update={"base_model": None})


def merge_adapters(
    adapters: Path, model: str | None, output: Path, tokenizer: Path | None, dtype: str | None
) -> None:
    """Merges adapters in PEFT's format into their base model; writes a Hugging Face folder, tensor by tensor.

    Args:
        model: the base model; None takes the one that the adapters name.
        dtype: dtype of the written weights; None keeps the dtype of each tensor.

    Raises:
        UserError: no base model is named, or the adapters do not fit it.
    """
    import torch

    from longspan.config.families.hub import model_config, model_folder
    from longspan.config.lora import read_peft_config
    from longspan.models.hf_weights import FolderWriter, SafetensorsFolder
    from longspan.models.peft import merge
    from longspan.training.model_files import files_of_merged

    _, named = read_peft_config(adapters)
    model = model or named
    if model is None:
        raise UserError(f"{adapters} does not name its base model. Give it with --model.")
    base = model_folder(model)
    weights = SafetensorsFolder(base)
    # config.json may name no dtype, ``auto``, or a dtype other than that of the weights.
    written = dtype or str(weights.dtype).removeprefix("torch.")
    config = {k: v for k, v in model_config(str(base))[0].items() if k != "dtype"} | {"torch_dtype": written}
    files = files_of_merged(config, base, adapters, tokenizer)
    writer = FolderWriter(output, None, None if dtype is None else getattr(torch, dtype))
    try:
        merge(weights, adapters, writer)
    except UserError:
        writer.discard()
        raise
    writer.finish(files)


def to_checkpoint(model: str, output: Path) -> None:
    """Writes a Hugging Face model as a checkpoint that holds only weights, in float32.

    Raises:
        UserError: the model does not fit, or the checkpoint cannot be written.
    """
    import shutil

    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import CheckpointException

    from longspan.config.architecture import Architecture
    from longspan.config.families.hub import architecture_of, model_folder, unused_fields, vocabulary_of
    from longspan.config.load import architecture_config
    from longspan.config.parameters import buffer_shapes
    from longspan.config.resolve import resolve
    from longspan.models.hf_weights import Names, SafetensorsFolder, check_tensors, read_part
    from longspan.training.checkpoint import to_text
    from longspan.training.checkpoint_files import SummingWriter, cause
    from longspan.training.description import BESIDE, describe_model

    values = architecture_of(model)
    for line in unused_fields(model):
        print(f"without effect here: {line}", file=sys.stderr)
    config = resolve(architecture_config(values), 1).config
    architecture = Architecture.of(config)
    vocab = vocabulary_of(values, model)
    source = SafetensorsFolder(model_folder(model))
    names = Names(architecture, vocab, source.model_type)
    check_tensors(source, names)
    weights = {}
    for name, shape in names.shapes().items():
        part = read_part(source, names, name, shape, [(0, size) for size in shape])
        weights[name] = part.to(torch.float32).contiguous()
    others = {name: shape for name, shape in buffer_shapes(architecture).items() if name not in weights}
    for name, shape in others.items():
        kind = torch.int64 if name.endswith("last_counts") else torch.float32
        weights[name] = torch.zeros(shape, dtype=kind)
    if config.tie_word_embeddings:
        weights["output_layer.weight"] = weights["embedding.word_embeddings.weight"]
    about = describe_model(config)
    description = {
        "longspan": __version__,
        "torch": torch.__version__,
        "layout": f"converted from {model}",
        "global_batch_size": None,
        **{k: about[k] for k in ("model", "settings", *BESIDE) if k in about},
        "base_model": str(Path(model).resolve()) if Path(model).is_dir() else model,
        "step": 0,
        "tokens": 0,
    }
    partial = begin_folder(output)
    try:
        dcp.save(
            {"model": weights}, storage_writer=SummingWriter(partial, to_text(description)), no_dist=True
        )
    except CheckpointException as error:
        free = shutil.disk_usage(partial).free / 2**20
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"--output {output}: cannot write there: {cause(error)} ({free:,.0f} MiB were free there)"
        ) from None
    name_folder(partial, output)
