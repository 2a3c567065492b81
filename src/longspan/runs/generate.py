"""Generates text after a prompt, from a model folder or a checkpoint, on one process and at small scale."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from longspan.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from longspan.config.lora import Lora
    from longspan.models import GPTModel


def is_checkpoint(path: Path) -> bool:
    """Whether this is a run's folder, its ``checkpoints``, or one of the checkpoints."""
    if any((path / name).is_file() for name in ("checkpoints/latest", "latest", ".metadata")):
        return True
    return any(any(path.glob(f"{folder}step_*/.metadata")) for folder in ("", "checkpoints/"))


class Source(NamedTuple):
    """A model to generate with.

    Attributes:
        values: the keys of its architecture.
        vocabulary: number of its tokens.
        tokenizer: the folder of its tokenizer.
        beside: folders whose generation_config.json may name further end tokens; the first one counts.
        lora: its adapters; None without.
        fill: gives a model on the CPU its weights.
    """

    values: dict[str, Any]
    vocabulary: int
    tokenizer: Path
    beside: list[Path]
    lora: Lora | None
    fill: Callable[[GPTModel], None]


def of_folder(folder: str) -> Source:
    """A model folder, a model's name, or a folder of adapters in PEFT's format.

    Raises:
        UserError: it is none, or adapters name no base model.
    """
    from longspan.config.families.hub import architecture_of, model_folder, unused_fields, vocabulary_of
    from longspan.config.lora import CONFIG_FILE, read_peft_config
    from longspan.models.hf_weights import SafetensorsFolder
    from longspan.weights import load_adapters, load_pretrained

    adapters = Path(folder) if (Path(folder) / CONFIG_FILE).is_file() else None
    lora, base = read_peft_config(adapters) if adapters is not None else (None, folder)
    if base is None:
        raise UserError(f"{folder} does not name its base model. Merge them first: longspan convert --lora.")
    values = architecture_of(base)
    vocabulary = vocabulary_of(values, base)
    for line in unused_fields(base):
        print(f"without effect here: {line}", file=sys.stderr)
    path = model_folder(base)
    own = adapters if adapters is not None and (adapters / "tokenizer.json").is_file() else path

    def fill(model: GPTModel) -> None:
        source = SafetensorsFolder(path)
        load_pretrained(model, source)
        if adapters is not None:
            load_adapters(model, adapters, source.model_type)

    return Source(values, vocabulary, own, [own, path], lora, fill)


def of_checkpoint(path: Path, folder: Path, tokenizer: str | None) -> Source:
    """A run's checkpoint.

    A model of a family of Hugging Face is exported first, with the end tokens of the model that the run began with.

    Args:
        folder: an empty folder for the export.
        tokenizer: a tokenizer.json or a folder with one; None takes the tokenizer of the checkpoint's run.

    Raises:
        UserError: the checkpoint is absent or incomplete, or there is no tokenizer.
    """
    from longspan.config.architecture import Architecture
    from longspan.config.families.config_json import export_problem
    from longspan.runs.convert import holds_tokenizer, to_hugging_face, tokenizer_of
    from longspan.runs.start import quiet_logs
    from longspan.training import checkpoint
    from longspan.training.checkpoint_files import read_tensors
    from longspan.training.description import config_of_model, refuse_class

    path = checkpoint.find(path, "generate")
    found = tokenizer_of(path) if tokenizer is None else Path(tokenizer)
    if found is None:
        raise UserError(f"{path}: its run names no tokenizer that is here. Give --tokenizer FOLDER.")
    if not holds_tokenizer(found):
        raise UserError(f"--tokenizer {found}: there is no tokenizer.json. Give it, or its folder.")
    quiet_logs()
    described = checkpoint.describe(path, "--checkpoint")
    refuse_class(
        described, path, "Generate with transformers, from the folder that its run exported (OUTPUT_DIR/hf)."
    )
    model = Architecture.of(config_of_model(described))
    if described.get("adapter") is not None or not export_problem(model):
        to_hugging_face(path, folder / "hf", found, "float32")
        return of_folder(str(folder / "hf"))
    metadata = checkpoint.verify(path, option="--checkpoint")

    def fill(model: GPTModel) -> None:
        from longspan.tensor_parallel.layers import local

        tensors = {name: local(tensor) for name, tensor in model.state_dict().items()}
        read_tensors(path, {"model": tensors}, metadata, "--checkpoint", no_dist=True)

    values = {name: value for kind in ("shapes", "numbers") for name, value in model.keys(kind).items()}
    where = found if found.is_dir() else found.parent
    return Source(values, described["model"]["vocab_size"], where, [where], None, fill)


def prompt_ids(tokenizer: Tokenizer, folder: Path, prompt: str) -> list[int]:
    """The numbers of a prompt's tokens, after the tokens that training puts in front of a text.

    Nothing is put in front of a prompt that begins with a special token.
    """
    from longspan.data import eod_id
    from longspan.data.text import begin_ids

    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    if ids and ids[0] in special:
        return ids
    end = eod_id(tokenizer, folder)
    # An empty prompt without tokens in front begins after the end of another document.
    return [*begin_ids(tokenizer, folder), *ids] or ([end] if end is not None else [0])


def end_ids(tokenizer: Tokenizer, folders: Iterable[Path]) -> set[int]:
    """The numbers of the tokens that end generated text.

    They are the tokenizer's end-of-document token and those of the first generation_config.json in
    ``folders``.
    """
    from longspan.data import eod_id
    from longspan.training.model_files import GENERATION, read_json

    folders = list(folders)
    said = next((found for f in folders if (found := read_json(f / GENERATION))), {}).get("eos_token_id")
    numbers = [eod_id(tokenizer, folders[0]), *(said if isinstance(said, list) else [said])]
    return {n for n in numbers if isinstance(n, int)}


def generate(
    source: Source, prompt: str, count: int, temperature: float, seed: int, special: bool = False
) -> str:
    """Returns the prompt and the text that the model generates after it.

    Args:
        count: the largest number of new tokens.
        temperature: 0 takes the most probable token.
        special: keep special tokens in the text.

    Raises:
        UserError: the tokens are more than the learned positions.
    """
    import torch

    from longspan.config.load import architecture_config
    from longspan.config.resolve import resolve
    from longspan.context_parallel import SequenceLayout
    from longspan.data import load_tokenizer
    from longspan.mesh.mesh import ParallelMesh, close_distributed, init_distributed
    from longspan.models import GPTModel
    from longspan.models.peft import attach

    values = source.values
    tokenizer = load_tokenizer(source.tokenizer)
    ends = end_ids(tokenizer, source.beside)
    ids = prompt_ids(tokenizer, source.tokenizer, prompt)
    most = values.get("max_position_embeddings")
    if values.get("position_embedding_type") == "learned_absolute" and most and len(ids) + count > most:
        raise UserError(
            f"a prompt of {len(ids)} tokens and --max-new-tokens {count} make {len(ids) + count}, but the model has learned "
            f"{most} positions (n_positions). Give a shorter prompt or a smaller --max-new-tokens."
        )
    config = architecture_config(values, len(ids) + count)
    init_distributed("cpu")
    try:
        run = resolve(config, 1)
        mesh = ParallelMesh.build(run.sizes, "cpu")
        with torch.device("meta"):
            model = GPTModel(
                run.transformer_config(),
                source.vocabulary,
                run.batch.sequence_len,
                pg_collection=mesh.groups,
            )
        if source.lora is not None:
            attach(model, source.lora)
        model.to_empty(device="cpu")
        source.fill(model)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _ in range(count):
                layout = SequenceLayout.contiguous(len(ids), 1)
                logits = model(torch.tensor([ids]), layout=layout)[0, -1].float()
                if temperature == 0:
                    token = int(logits.argmax())
                else:
                    token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
                if token in ends and not special:
                    break
                ids.append(token)
                if token in ends:
                    break
    finally:
        close_distributed()
    return tokenizer.decode(ids, skip_special_tokens=not special)
