"""``longspan generate``: a model folder or a run's checkpoint writes on from a prompt, on one process, at small scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longspan.cli.config import number
from longspan.cli.options import take_options
from longspan.config.load import read_yaml
from longspan.config.schema import GROUPS, TrainConfig
from longspan.errors import UserError, did_you_mean

USAGE = """\
usage: longspan generate MODEL [--prompt TEXT] [--max-new-tokens N] [--temperature T] [--seed S] [--tokenizer FOLDER]

Writes on from a prompt. MODEL: a Hugging Face folder such as OUTPUT_DIR/hf, or a run's folder or checkpoint (OUTPUT_DIR,
OUTPUT_DIR/checkpoints/step_00000100), trained at any layout. Each token reads the whole text again (there is no
key/value cache): good for a look at a model, not for serving.
  --prompt TEXT       what to start from (default: nothing)
  --max-new-tokens N  default 64
  --temperature T     0 always takes the likeliest token (default 0.8)
  --seed S            of the choice between tokens (default 0)
  --tokenizer FOLDER  where the tokenizer is not beside the model or named by the run
"""
OPTIONS = {
    "--prompt": True,
    "--max-new-tokens": True,
    "--temperature": True,
    "--seed": True,
    "--tokenizer": True,
}


def run(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return 0
    taken, rest, problems = take_options(arguments, OPTIONS)
    problems += [f"{a}: unknown option.{did_you_mean(a, OPTIONS)}" for a in rest if a.startswith("--")]
    models = [a for a in rest if not a.startswith("--")]
    if len(models) != 1:
        problems.append("longspan generate needs one model folder: longspan generate MODEL --prompt TEXT")
    count = number(taken, "--max-new-tokens", problems) or 64
    seed = number(taken, "--seed", problems, least=0) or 0
    temperature = 0.8
    try:
        temperature = float(taken.get("--temperature", temperature))
    except ValueError:
        problems.append(f"--temperature {taken['--temperature']!r}: a number from 0 on.")
    if temperature < 0:
        problems.append(f"--temperature {temperature}: a number from 0 on.")
    if problems:
        raise UserError(problems)
    tokenizer = Path(taken["--tokenizer"]) if "--tokenizer" in taken else None
    print(generate(Path(models[0]), taken.get("--prompt", ""), count, temperature, seed, tokenizer))
    return 0


def generate(
    path: Path, prompt: str, count: int, temperature: float, seed: int, tokenizer_folder: Path | None = None
) -> str:
    """The prompt and what the model makes of it."""
    import torch

    from longspan.config.architecture import architecture_of, model_folder
    from longspan.config.load import architecture_config
    from longspan.config.resolve import resolve
    from longspan.context_parallel import SequenceLayout
    from longspan.data import eod_id, load_tokenizer
    from longspan.mesh.mesh import ParallelMesh, close_distributed, init_distributed
    from longspan.models import GPTModel
    from longspan.models.huggingface import SafetensorsFolder
    from longspan.parallelize import load_pretrained
    from longspan.training import checkpoint

    saved = checkpoint.find(path) if is_checkpoint(path) else None
    if saved is not None:
        values, tokenizer_of_run = of_checkpoint(saved)
        tokenizer_folder = tokenizer_folder or tokenizer_of_run
        if tokenizer_folder is None:
            raise UserError(f"{saved}: the run names no tokenizer. Give --tokenizer FOLDER.")
    else:
        values, folder = architecture_of(str(path)), model_folder(str(path))
        tokenizer_folder = tokenizer_folder or folder
    tokenizer = load_tokenizer(tokenizer_folder)
    end = eod_id(tokenizer, tokenizer_folder)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids or ([end] if end is not None else [0])
    config = architecture_config(values)
    init_distributed("cpu")
    try:
        run = resolve(config, 1)
        mesh = ParallelMesh.build(run.sizes, "cpu")
        with torch.device("meta"):
            model = GPTModel(
                run.transformer_config(), values["vocab_size"], config.sequence_len, pg_collection=mesh.groups
            )
        model.to_empty(device="cpu")
        if saved is not None:
            checkpoint.load(saved, model, None, rng=False)
        else:
            load_pretrained(model, SafetensorsFolder(folder))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _ in range(count):
                layout = SequenceLayout.contiguous(len(ids), 1)
                logits = model(torch.tensor([ids]), layout=layout)[0, -1].float()
                if temperature == 0:
                    token = int(logits.argmax())
                else:
                    token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
                if token == end:
                    break
                ids.append(token)
    finally:
        close_distributed()
    return tokenizer.decode(ids)


def is_checkpoint(path: Path) -> bool:
    """Is this a run's folder, its ``checkpoints``, or one of them?"""
    return any((path / name).is_file() for name in ("checkpoints/latest", "latest", ".metadata"))


def of_checkpoint(path: Path) -> tuple[dict[str, Any], Path | None]:
    """The architecture of a checkpoint, as keys, and the tokenizer its run names.

    Raises:
        UserError: the run trains adapters, whose checkpoints lack the model.
    """
    from longspan.training import checkpoint

    said = checkpoint.describe(path)
    written = path.parent.parent / "config.yaml"
    run = read_yaml(written) if written.is_file() else {}
    if run.get("adapter"):
        raise UserError(
            f"{path} holds adapters. Merge them into the model first, and generate from its folder."
        )
    values = {k: v for k, v in run.items() if k in GROUPS["model"].model_fields and k != "base_model"}
    values |= {k: v for k, v in (said["model"] | said["settings"]).items() if k in TrainConfig.model_fields}
    values.pop("reinit_weights", None)
    folders = [Path(folder) for folder in (run.get("tokenizer_config"), written.parent / "hf") if folder]
    return values, next((f for f in folders if f.is_file() or (f / "tokenizer.json").is_file()), None)
