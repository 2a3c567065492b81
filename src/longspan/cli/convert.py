"""``longspan convert``: between a checkpoint and a Hugging Face folder, without starting a job.

Both ways go through the tensors one after another; nothing is computed and no process group
is made. From a checkpoint the optimizer's state stays behind; from Hugging Face there is none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from longspan import __version__
from longspan.cli.options import take_options
from longspan.errors import UserError, did_you_mean

USAGE = """\
usage: longspan convert --checkpoint STEP_FOLDER --output FOLDER [--tokenizer FOLDER] [--dtype float32|bfloat16]
       longspan convert --model HF_FOLDER --output STEP_FOLDER

The first makes a Hugging Face folder of a checkpoint, the second a checkpoint of a Hugging Face model, to start from
with --resume STEP_FOLDER --no-load-optim.
  --tokenizer FOLDER  put this tokenizer beside the weights
  --dtype D           of the written weights (default float32)
"""
OPTIONS = {"--checkpoint": True, "--model": True, "--output": True, "--tokenizer": True, "--dtype": True}
DTYPES = ("float32", "bfloat16")


def run(arguments: Sequence[str]) -> int:
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return 0 if arguments else 2
    taken, rest, problems = take_options(arguments, OPTIONS)
    problems += [f"{a}: unknown option.{did_you_mean(a, OPTIONS)}" for a in rest]
    if ("--checkpoint" in taken) == ("--model" in taken):
        problems.append("give one of --checkpoint STEP_FOLDER and --model HF_FOLDER.")
    if "--output" not in taken:
        problems.append("--output is missing.")
    elif Path(taken["--output"]).exists():
        problems.append(f"--output {taken['--output']} exists. Give a new folder; nothing is overwritten.")
    if "--model" in taken:
        problems += [f"{o} goes with --checkpoint only." for o in ("--tokenizer", "--dtype") if o in taken]
    if taken.get("--dtype", "float32") not in DTYPES:
        problems.append(f"--dtype {taken['--dtype']!r}: one of {', '.join(DTYPES)}.")
    if "--tokenizer" in taken and not Path(taken["--tokenizer"]).exists():
        problems.append(f"--tokenizer {taken['--tokenizer']} does not exist.")
    if problems:
        raise UserError(problems)
    output = Path(taken["--output"])
    if "--checkpoint" in taken:
        tokenizer = Path(taken["--tokenizer"]) if "--tokenizer" in taken else None
        to_hugging_face(Path(taken["--checkpoint"]), output, tokenizer, taken.get("--dtype", "float32"))
    else:
        to_checkpoint(taken["--model"], output)
    print(f"wrote {output}")
    return 0


def to_hugging_face(path: Path, output: Path, tokenizer: Path | None, dtype: str) -> None:
    """A checkpoint's weights -> a Hugging Face folder, tensor by tensor."""
    import torch
    import torch.distributed.checkpoint as dcp

    from longspan.config.hugging_face import FIELDS, export_problem, hugging_face_config
    from longspan.config.model import TransformerConfig
    from longspan.config.schema import TrainConfig
    from longspan.models.huggingface import FolderWriter, Names
    from longspan.training import checkpoint

    path = checkpoint.find(path)
    said = checkpoint.describe(path)
    defaults = {name: TrainConfig.model_fields[name].default for name in FIELDS}
    model = defaults | said["model"] | said["settings"]
    model |= {name: said.get(name) for name in ("init_method_std", "max_position_embeddings")}
    if problem := export_problem(model):
        raise UserError(f"--checkpoint {path}: {problem}")
    fields = {name: model[name] for name in FIELDS if name in TransformerConfig.__dataclass_fields__}
    config = TransformerConfig(**fields, share_embeddings_and_output_weights=model["tie_word_embeddings"])
    metadata = dcp.FileSystemReader(str(path)).read_metadata().state_dict_metadata
    writer = FolderWriter(output, Names(config, model["vocab_size"]), getattr(torch, dtype))
    for name in writer.names.all():
        about = metadata[f"model.{name}"]
        state = {"model": {name: torch.empty(about.size, dtype=about.properties.dtype)}}
        dcp.load(state, checkpoint_id=str(path), no_dist=True)
        writer.add(name, state["model"][name])
    writer.finish(hugging_face_config(model, dtype), tokenizer)


def to_checkpoint(model: str, output: Path) -> None:
    """A Hugging Face model -> a checkpoint of weights alone."""
    import os
    import shutil

    import torch
    import torch.distributed.checkpoint as dcp

    from longspan.config.architecture import architecture_of, model_folder
    from longspan.config.load import architecture_config
    from longspan.config.model import padded_vocab_size
    from longspan.config.resolve import resolve
    from longspan.models.huggingface import Names, SafetensorsFolder, check_tensors, read_part
    from longspan.training.checkpoint import DESCRIPTION
    from longspan.training.loop import describe_model

    values = architecture_of(model)
    config = architecture_config(values)
    resolved = resolve(config, 1)
    architecture = resolved.transformer_config()
    vocab = values["vocab_size"]
    source = SafetensorsFolder(model_folder(model))
    names = Names(architecture, vocab)
    check_tensors(source, names)
    weights = {}
    for name in names.all():
        place = names.place(name)
        shape = list(source.slice(place.name).get_shape())
        if place.transposed:
            shape.reverse()
        shape[0] //= place.parts
        if names.rows(name) is not None:
            shape[0] = padded_vocab_size(shape[0])
        part = read_part(source, names, name, shape, [(0, size) for size in shape])
        weights[name] = part.to(torch.float32).contiguous()
    if config.tie_word_embeddings:
        weights["output_layer.weight"] = weights["embedding.word_embeddings.weight"]
    about = describe_model(resolved)
    description = {
        "longspan": __version__,
        "torch": torch.__version__,
        "layout": f"converted from {model}",
        "global_batch_size": None,
        **{k: about[k] for k in ("model", "settings", "init_method_std", "max_position_embeddings")},
        "step": 0,
        "tokens": 0,
    }
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dcp.save({"model": weights}, checkpoint_id=str(partial), no_dist=True)
    (partial / DESCRIPTION).write_text(json.dumps(description, indent=2), encoding="utf-8")
    os.rename(partial, output)
