"""``longspan validate``: checks a config, without data, weights, GPU or network."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longspan.cli.options import key_help, number, take_options
from longspan.config.architecture import Architecture
from longspan.config.data import PATHS, marks_documents, read_blend
from longspan.config.dialects.megatron import parse_megatron_flags
from longspan.config.dialects.megatron_messages import by_flags
from longspan.config.experts import experts_line
from longspan.config.families.hub import is_hub_id, model_config, unused_fields
from longspan.config.load import Reading, make_config
from longspan.config.options import Overrides, parse_overrides
from longspan.config.recurrent import is_recurrent, recurrent_line
from longspan.config.resolve import complete
from longspan.config.run import batch_of, sizes_of, stages_of
from longspan.config.schema import DatasetConfig, TrainConfig
from longspan.config.stages import pipeline_line
from longspan.config.yaml_file import read_yaml
from longspan.errors import UserError
from longspan.runs.prepare import check_vocabulary, end_of_document

USAGE = """\
usage: longspan validate CONFIG... [--any-key value] [--num-processes N] [--json]
       longspan validate --megatron FLAGS [--num-processes N] [--json]

Checks configs, or the flags of pretrain_gpt.py, and prints every problem, or a summary: mesh, batch arithmetic, and
what has no effect here. Starts nothing and reads neither data nor weights; nothing is fetched.
  --num-processes N  processes over all machines to check against (default: the product of the parallel sizes)
  --megatron         what follows are Megatron-LM's flags, with its defaults
  --json             one JSON object: valid, and configs: [{config, valid, problems, mesh, batch, sequence, steps,
                     model, without_effect, not_checked}]
Exit code 0: all are valid, 2: not.
"""
OPTIONS = {"--json": False, "--num-processes": True, "--megatron": False}


def run(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        print(key_help("--megatron" in arguments))
        return 0
    # With this variable the hub's library uses only the files on this machine.
    os.environ["HF_HUB_OFFLINE"] = "1"
    taken, rest, problems = take_options(arguments, OPTIONS)
    world = number(taken, "--num-processes", problems)
    if "--megatron" in taken:
        reading, defaults = parse_megatron_flags(rest, list(OPTIONS))
        reading.problems[:0] = problems
        result = check("flags", reading, world)
        result["problems"] = [by_flags(problem, defaults) for problem in result["problems"]]
        for name in ("without_effect", "not_checked"):
            result[name] = [by_flags(note) for note in result.get(name, [])]
        results = [result]
    else:
        given = parse_overrides(rest, list(OPTIONS), positionals=1)
        given.problems[:0] = problems
        if not given.rest:
            raise UserError(
                [*given.problems, "longspan validate needs a config file: longspan validate CONFIG.yaml"]
            )
        results = [check(path, read(path, given), world) for path in given.rest]
    valid = all(result["valid"] for result in results)
    if "--json" in taken:
        shown = [{k: v for k, v in result.items() if k != "lines"} for result in results]
        print(json.dumps({"valid": valid, "configs": shown}, indent=2))
    else:
        for result in results:
            report(result, named=len(results) > 1)
    return 0 if valid else 2


def read(path: str, given: Overrides) -> Reading:
    """Reads a config file with the options over it. If it cannot be read, the result holds the problem."""
    try:
        reading = make_config(read_yaml(path), given.values)
    except UserError as error:
        return Reading(None, [*given.problems, *error.problems], set(), [])
    reading.problems[:0] = given.problems
    reading.notes += given.notes
    return reading


def check(name: str, reading: Reading, world: int | None) -> dict[str, Any]:
    """The content of ``--json`` for one config, and the lines of the summary under ``lines``."""
    result: dict[str, Any] = {"config": name, "valid": False, "problems": reading.problems}
    config, bad, not_checked = reading.config, set(reading.bad), []
    if config is None:
        return result
    if config.base_model is not None and is_elsewhere(config.base_model):
        try:
            model_config(config.base_model, network=False)
        except UserError:
            bad.add("base_model")
            not_checked.append(
                f"base_model {config.base_model}: its config.json is not on this machine, so the rules about layers and "
                "heads are not checked"
            )
    try:
        whole = complete(config, world, bad_keys=bad, earlier=reading.problems)
    except UserError as error:
        return result | {"problems": error.problems, "without_effect": reading.notes}
    try:
        check_templates(config)
        if folder := tokenizer_here(config):
            check_vocabulary(whole, folder)
        elif config.tokenizer_config is not None and config.vocab_file is None:
            not_checked.append(f"tokenizer_config: {config.tokenizer_config} is not on this machine")
        elif not has_tokenizer(config) and config.eod_token_id is None and marks_documents(config):
            end_of_document(whole, None)
    except UserError as error:
        return result | {"problems": error.problems, "without_effect": reading.notes}
    if config.base_model is not None and config.rope_scaling is None and "base_model" not in bad:
        reading.notes += unused_fields(config.base_model, whole.model_implementation)
    paths = [("datasets", source.path) for source in config.datasets]
    for name in PATHS:
        if given := getattr(config, name):
            paths += [(name, member.path) for member in read_blend(name, given)]
    not_checked += [f"{name}: {path} is not on this machine" for name, path in paths if not is_here(path)]
    return (
        result
        | summary(whole, world)
        | {"valid": True, "without_effect": reading.notes, "not_checked": not_checked}
    )


def tokenizer_here(config: TrainConfig) -> str | None:
    """The tokenizer file or folder that the run loads, if it is on this machine."""
    folder = config.tokenizer_config or config.base_model
    if folder is None or config.vocab_file is not None or config.tokenizer_train_vocab_size is not None:
        return None
    path = Path(folder)
    return folder if path.is_file() or (path / "tokenizer.json").is_file() else None


def has_tokenizer(config: TrainConfig) -> bool:
    """Whether the run may have a tokenizer, on this machine or elsewhere."""
    keys = ("tokenizer_config", "base_model", "vocab_file", "tokenizer_train_vocab_size")
    return any(getattr(config, name) is not None for name in keys)


def check_templates(config: TrainConfig) -> None:
    """Refuses a chat_template that names no bundled template; a tokenizer's own template is not checked."""
    places: list[TrainConfig | DatasetConfig] = [config, *config.datasets, *config.test_datasets]
    for keys in places:
        name = keys.chat_template
        if name is not None and keys.chat_template_jinja is None and not name.startswith("tokenizer_default"):
            from longspan.data.chat import find_template

            find_template(name, None, Path(), {}, [])


def is_elsewhere(base_model: str | None) -> bool:
    """Whether a base_model is the id of a model on the hub, and not a local folder."""
    return base_model is not None and not Path(base_model).exists() and is_hub_id(base_model)


def is_here(path: str) -> bool:
    return path == "python-stdlib" or any(Path(path + suffix).exists() for suffix in ("", ".bin", ".idx"))


def summary(config: TrainConfig, world: int | None) -> dict[str, Any]:
    """Mesh, batch, sequence, steps and model, as numbers and (``lines``) as text."""
    sizes, batch = sizes_of(config), batch_of(config)
    rows = -(-config.sequence_len // sizes.cp)
    moves = config.cp_comm_type if isinstance(config.cp_comm_type, str) else "/".join(config.cp_comm_type)
    axes = {
        "tp": sizes.tp,
        "cp": sizes.cp,
        "dp_shard": sizes.dp_shard,
        "dp_replicate": sizes.dp_replicate,
        "pp": sizes.pp,
        "ep": sizes.ep,
        "etp": sizes.etp or sizes.tp,
    }
    lines = {
        "mesh": f"{sizes.equation()} processes"
        + (
            " (the product of the parallel sizes; --num-processes N checks against another number)"
            if world is None
            else ""
        ),
        "batch": batch.equation(sizes.dp),
        "sequence": f"{config.sequence_len:,} tokens"
        + (
            f", {rows:,} on each of {sizes.cp} context parallel ranks before padding ({moves})"
            if sizes.cp > 1
            else ""
        ),
        "steps": str(config.max_steps)
        if config.max_steps
        else f"as many as {config.num_epochs:g} epochs of the data have",
    }
    if config.num_layers is not None and config.num_attention_heads is not None:
        groups = config.num_query_groups or config.num_attention_heads
        lines["model"] = (
            f"{config.num_layers} layers, hidden {config.hidden_size}, {config.num_attention_heads} heads ({groups} key/value)"
        )
        if is_recurrent(config.layer_types, config.hybrid_override_pattern):
            lines["mixers"] = recurrent_line(Architecture.of(config))
        if config.pipeline_schedule is not None:
            stages = stages_of(config, Architecture.of(config))
            lines["pipeline"] = pipeline_line(stages, sizes.pp, config.pipeline_schedule, batch.accumulation)
        if config.num_moe_experts is not None:
            imported = config.base_model is not None
            lines["experts"] = experts_line(Architecture.of(config), sizes, imported)
    return {
        "lines": lines,
        "mesh": axes | {"processes": sizes.world_size},
        "batch": {
            "micro_batch_size": batch.micro,
            "gradient_accumulation_steps": batch.accumulation,
            "dp": sizes.dp,
            "global_batch_size": batch.global_size,
            "tokens": batch.tokens_a_step,
        },
        "sequence": {"tokens": config.sequence_len, "cp": sizes.cp, "tokens_of_a_rank": rows},
        "steps": config.max_steps,
        "model": {
            name: getattr(config, name)
            for name in (
                "num_layers",
                "hidden_size",
                "num_attention_heads",
                "num_query_groups",
                "vocab_size",
                "num_moe_experts",
            )
        },
    }


def report(result: dict[str, Any], named: bool) -> None:
    """Prints the result of one config: problems to stderr, a summary to stdout.

    Args:
        named: whether to begin a problem with the config's name, because there are several configs.
    """
    name = f"{result['config']}: " if named else ""
    if not result["valid"]:
        for problem in result["problems"]:
            print(f"longspan: error: {name}{problem}", file=sys.stderr)
        return
    print(f"{result['config']}: valid")
    for row, text in result["lines"].items():
        print(f"  {row:<9} {text}")
    for title, texts in (("without effect here", "without_effect"), ("not checked", "not_checked")):
        for i, text in enumerate(result[texts]):
            print(f"  {title + ':' if i == 0 else '':<20} {text}")
