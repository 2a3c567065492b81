"""Makes a complete config from the user's config: checks the rules between keys, and does the arithmetic.

``resolve`` fills in everything that follows from the config, the number of processes and the device. If rules
are broken, it raises one error with all of them. It needs neither torch nor a process group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from pydantic import ValidationError

from longspan.config.architecture import Architecture, key_of
from longspan.config.experts import expert_grid_problems
from longspan.config.families.hub import architecture_of, implementation_of, sequence_problem
from longspan.config.rope import rope_type, with_original_length
from longspan.config.rules import RULES
from longspan.config.rules.pipeline import micro_batch_problems, schedule_of, virtual_size_of
from longspan.config.run import Checked, sizes_of
from longspan.config.schema import TrainConfig
from longspan.config.sizes import MeshSizes
from longspan.errors import Problem, UserError


def processes_asked_for(config: TrainConfig) -> int:
    """The product of the parallel sizes: the number of processes if the caller gives none."""
    return (
        config.tensor_parallel_size
        * config.context_parallel_size
        * config.pipeline_parallel_size
        * (config.dp_shard_size or 1)
        * config.dp_replicate_size
    )


def resolve(config: TrainConfig, world_size: int | None = None, **known: Any) -> Checked:
    """Checks the rules between keys and does the arithmetic; arguments and errors as for :func:`complete`."""
    return Checked.of(complete(config, world_size, **known))


def compiles(config: TrainConfig, device: str) -> bool:
    """Whether the model is compiled, if the machine has a compiler.

    ``torch_compile: auto`` compiles on CUDA, unless deterministic_mode is on.
    """
    if config.torch_compile == "auto" and config.model_implementation == "transformers":
        return False
    if config.torch_compile == "auto":
        return device == "cuda" and not config.deterministic_mode
    return config.torch_compile


def complete(
    config: TrainConfig,
    world_size: int | None = None,
    *,
    device: str | None = None,
    compiler: bool = True,
    bad_keys: Iterable[str] = (),
    earlier: Iterable[str] = (),
) -> TrainConfig:
    """The config, with each key filled in that follows from other keys, from base_model or from the device.

    Args:
        world_size: number of processes; None means the product of the parallel sizes.
        device: ``cpu`` or ``cuda``, for the run; None means the config's device, and the CPU for ``auto``.
        compiler: whether the machine has a compiler for that device.
        bad_keys: keys with problems that are already known: broken rules about them are not reported.
        earlier: problems that are already known; they are raised together with the new problems.

    Raises:
        UserError: with all problems.
    """
    found: list[Problem] = []
    bad = set(bad_keys)
    if config.base_model is not None:
        config = _with_base_model(config, config.base_model, found, bad)
    world = world_size if world_size is not None else processes_asked_for(config)
    sizes = _sizes(config, world, found)
    micro, accumulation, total = _batch(config, sizes.dp, found)
    for rule in RULES:
        found += rule(config)
    found += micro_batch_problems(config, accumulation)
    if config.num_moe_experts is not None and sizes.world_size == world:
        etp = sizes.etp or sizes.tp
        found += expert_grid_problems(world, etp, sizes.ep, sizes.pp, sizes.dp_replicate)
    messages = list(earlier) + [text for fields, text in found if not bad.intersection(fields)]
    if messages:
        raise UserError(messages)
    if device is None:
        device = "cpu" if config.device == "auto" else config.device
    bf16, parallel = config.bf16, config.sequence_parallel
    return config.model_copy(
        update={
            "device": device,
            "model_implementation": "native"
            if config.model_implementation == "auto"
            else config.model_implementation,
            "bf16": device == "cuda" and config.params_dtype == "float32" if bf16 == "auto" else bf16,
            "tf32": config.tf32 is True,
            "torch_compile": compiles(config, device) and compiler,
            "micro_batch_size": micro,
            "gradient_accumulation_steps": accumulation,
            "global_batch_size": total,
            "dp_shard_size": sizes.dp_shard,
            "pipeline_schedule": None if sizes.pp == 1 else schedule_of(config, accumulation),
            "virtual_pipeline_parallel_size": None if sizes.pp == 1 else virtual_size_of(config),
            # The key has no effect if tp is 1.
            "sequence_parallel": None if sizes.tp == 1 else True if parallel is None else parallel,
        }
    )


def _with_base_model(config: TrainConfig, name: str, found: list[Problem], bad: set[str]) -> TrainConfig:
    """The config, with base_model's architecture for all keys that the config itself does not set."""
    try:
        given = {k for k in config.model_fields_set if getattr(config, k) is not None}
        # A model that was not found before is not searched on the hub again.
        network = "base_model" not in bad
        implementation = implementation_of(name, config.model_implementation, network)
        whole = architecture_of(name, network, implementation)
        base = {k: v for k, v in whole.items() if k not in given}
        if "moe_router_load_balancing_type" in given:
            # The coefficient belongs to the kind of loss that base_model was trained with.
            base.pop("moe_aux_loss_coeff", None)
        base["model_implementation"] = implementation
        changed = _changed(config, whole) if implementation == "transformers" else []
        found += [((key, "base_model"), text) for key, text in changed]
        config = TrainConfig.model_validate(config.model_dump(exclude_unset=True) | base)
        if implementation == "transformers":
            if text := sequence_problem(name, config.sequence_len):
                found.append((("sequence_len", "base_model"), text))
            return config
        return _longer(config, whole, given)
    except ValidationError as error:
        for e in error.errors():
            text = f"base_model: {e['loc'][0]} in its config.json: {e['input']!r} {e['msg']}."
            found.append((("base_model",), text))
    except UserError as error:
        found.append((("base_model",), str(error)))
        bad |= {"num_layers", "hidden_size", "num_attention_heads", "vocab_size", "reinit_weights"}
        bad.add("num_moe_experts")
    return config


def _changed(config: TrainConfig, base: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, message) for each key of the architecture that the config sets to another value than base_model has.

    transformers' own class reads its config.json, so that such a key would have no effect.

    Args:
        base: base_model's architecture keys.
    """
    keys = [key_of(one) for one in fields(Architecture)] + ["vocab_size"]
    # The dropouts and rope_scaling have rules of their own.
    keys = [key for key in keys if key not in ("attention_dropout", "hidden_dropout", "rope_scaling")]
    defaults = {key: TrainConfig.model_fields[key].default for key in keys}
    return [
        (
            key,
            f"{key} {getattr(config, key)!r}: base_model is computed by transformers' own class, which reads its config.json. "
            "Change it there, or leave the key out.",
        )
        for key in keys
        if key in config.model_fields_set and getattr(config, key) not in (None, base.get(key, defaults[key]))
    ]


def _longer(config: TrainConfig, base: dict[str, Any], given: set[str]) -> TrainConfig:
    """The config with the keys that follow from base_model's own length, ``base["max_position_embeddings"]``.

    A model may train on longer sequences than base_model was made for.

    Args:
        base: base_model's architecture keys.
        given: the keys that the config sets itself.
    """
    length, scaling = base.get("max_position_embeddings"), config.rope_scaling
    if config.position_embedding_type != "rope":
        return config
    changes: dict[str, Any] = {}
    if scaling:
        changes["rope_scaling"] = with_original_length(scaling, length)
    if length is not None and "max_position_embeddings" not in given and rope_type(scaling) != "dynamic":
        changes["max_position_embeddings"] = max(length, config.sequence_len)
    return config.model_copy(update=changes)


def _sizes(config: TrainConfig, world: int, found: list[Problem]) -> MeshSizes:
    fixed = (
        config.tensor_parallel_size
        * config.context_parallel_size
        * config.pipeline_parallel_size
        * config.dp_replicate_size
    )
    shard = config.dp_shard_size or max(1, world // fixed)
    sizes = sizes_of(config.model_copy(update={"dp_shard_size": shard}))
    keys = ("tensor_parallel_size", "context_parallel_size", "dp_shard_size", "dp_replicate_size")
    if sizes.world_size != world:
        remedy = (
            f"Leave dp_shard_size out to take what is left ({world // fixed})"
            if config.dp_shard_size and world % fixed == 0
            else f"Use a multiple of {fixed} processes"
            if world % fixed
            else f"Start {sizes.world_size} processes"
        )
        found.append(
            (
                keys,
                f"parallel sizes: {sizes.equation(world)}. The product must be the number of processes. {remedy}, "
                "or change a size.",
            )
        )
    return sizes


def _batch(config: TrainConfig, dp: int, found: list[Problem]) -> tuple[int, int, int]:
    """(micro_batch_size, gradient_accumulation_steps, global_batch_size), of which any two give the third."""
    micro, steps, total = (
        config.micro_batch_size,
        config.gradient_accumulation_steps,
        config.global_batch_size,
    )
    keys = ("micro_batch_size", "gradient_accumulation_steps", "global_batch_size")
    if total is None:
        micro, steps = micro or 1, steps or 1
        return micro, steps, micro * steps * dp
    if micro is None:
        micro = total // (steps * dp) if steps else 1
    if steps is None:
        steps = total // (max(1, micro) * dp)
    micro, steps = max(1, micro), max(1, steps)
    if micro * steps * dp != total:
        unit = (config.micro_batch_size or 1) * dp
        near = max(1, round(total / unit)) * unit
        given = [f"{name} {getattr(config, name)}" for name in keys[:2] if getattr(config, name) is not None]
        # The message shows only the factors that the config sets.
        factors = " x ".join([*given, f"dp {dp}"])
        if len(given) == 2:
            text = (
                f"global_batch_size {total}: {factors} = {micro * steps * dp}. The two must be equal; give two of the three: leave "
                f"gradient_accumulation_steps out, with global_batch_size {near}."
            )
        else:
            unit = math.prod(
                n for n in (config.micro_batch_size, config.gradient_accumulation_steps, dp) if n
            )
            near = max(1, round(total / unit)) * unit
            shown = f"{factors} = {unit}" if given else factors
            text = (
                f"global_batch_size {total} is not a multiple of {shown} (dp: data parallel ranks). Take one that is, "
                f"e.g. global_batch_size {near}."
            )
        found.append((keys, text))
    return micro, steps, total
