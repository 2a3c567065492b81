"""Megatron-LM's entry point: only command-line flags, with Megatron's defaults.

The parser is generated from the schema, which holds a key's flag, its values and its default at this
entry point. So a new key has both names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longspan.config.data import DEFAULT_SPLIT, read_split
from longspan.config.dialects.table import EXTERNAL_NAMES
from longspan.config.load import Reading, make_config
from longspan.config.options import Overrides, option_table, parse_overrides, read_external
from longspan.config.packages import has_package
from longspan.config.schema import keys, names
from longspan.errors import UserError, did_you_mean


def parse_megatron_flags(
    arguments: Sequence[str],
    other_options: Sequence[str] = (),
    script_defaults: Mapping[str, Any] | None = None,
    own_data: bool = False,
) -> tuple[Reading, dict[str, Any]]:
    """Reads ``--num-layers 2 --hidden-size 64 --lr 1e-4 ...`` as a config with Megatron's defaults.

    Args:
        other_options: options that the caller handles itself, for similar names in messages.
        script_defaults: name of a flag, with underscores, or of a key -> its value where the flags do not set
            it.
        own_data: the caller has its own data, so that flags without data mean mock data, as in Megatron-LM.

    Returns:
        (what was read, with the problems of flags and values; key -> Megatron's default, for each default
        taken that differs from the YAML's).
    """
    given = parse_overrides(arguments, other_options)
    given.problems += [f"{a!r}: unexpected argument; values follow their --flag." for a in given.rest]
    if script_defaults:
        _add_defaults(given, script_defaults)
    values = {name: _ours(name, value) for name, value in given.values.items()}
    if own_data and not any(values.get(name) for name in ("datasets", "data_path", "train_data_path")):
        values["mock_data"] = True
    # Megatron-LM uses Weights & Biases if a project is given.
    if values.get("wandb_project") and "use_wandb" not in values:
        values["use_wandb"] = has_package("wandb")
        if not values["use_wandb"]:
            text = "needs the wandb package, which is not installed. pip install 'longspan[wandb]', or leave it out."
            given.problems.append(f"wandb_project {values.pop('wandb_project')!r} {text}")
    idle = _leftovers(values)
    values = {name: value for name, value in values.items() if name not in idle}
    defaults = megatron_defaults(values)
    reading = make_config(defaults, values)
    reading.problems[:0] = given.problems
    reading.notes[:0] = [*given.notes, *(f"{name}: {why}" for name, why in idle.items())]
    return reading, defaults


def _add_defaults(given: Overrides, defaults: Mapping[str, Any]) -> None:
    """Adds the values of ``defaults`` for keys that the flags do not set, with notes and problems."""
    table, switches, read = names(), option_table(), Overrides()
    for name, value in defaults.items():
        if name in table:
            read.values[table[name]] = value
        elif name in switches and isinstance(value, bool):
            k, fixed = switches[name]
            read.values |= {k.name: fixed} if value else {}
        elif name in EXTERNAL_NAMES:
            # A switch that is off by default has no effect.
            if value is not False and value is not None:
                read_external(name, value, read)
        else:
            near = did_you_mean(name, [*table, *switches, *EXTERNAL_NAMES])
            read.problems.append(f"args_defaults {name!r}: unknown argument.{near}")
    given.problems += read.problems
    given.notes += read.notes
    given.values = {name: value for name, value in read.values.items() if value is not None} | given.values


def megatron_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron-LM's defaults that differ from the YAML's, for keys that the flags do not set in any way."""
    idle = {key for key, other in OTHER_WAYS.items() if other in given}
    if not _evaluates(given):
        idle |= {"eval_steps", "eval_iters"}
    return {
        k.name: k.default_of_megatron
        for k in keys()
        if k.default_of_megatron != k.default and k.name not in {*given, *idle}
    }


#: key with a default at this entry point -> another key for the same thing
OTHER_WAYS = {
    "warmup_steps": "warmup_ratio",
    "eval_steps": "evals_per_epoch",
    "eval_iters": "eval_max_samples",
}


def _evaluates(given: Mapping[str, Any]) -> bool:
    """Whether there is data to evaluate on, and evaluation is on. Invalid values are reported elsewhere."""
    if given.get("eval_iters") == 0:
        return False
    if given.get("train_data_path"):
        return bool(given.get("valid_data_path"))
    if given.get("datasets"):
        return bool(given.get("val_set_size") or given.get("test_datasets"))
    if not (given.get("data_path") or given.get("mock_data")):
        return False
    try:
        return read_split(str(given.get("split") or DEFAULT_SPLIT))[1] > 0
    except UserError:
        return False


def _leftovers(given: Mapping[str, Any]) -> dict[str, str]:
    """Keys that have no effect because of other keys of a launch script, each with the reason.

    Megatron-LM accepts such keys without a message. Two keys for the same thing are refused elsewhere.
    """
    found: dict[str, str] = {}

    def idle(condition: bool, why: str, *names: str) -> None:
        found.update({name: why for name in names if condition and name in given})

    nothing = "Nothing is held out, so nothing is evaluated."
    off = given.get("eval_iters") == 0
    idle(
        not _evaluates(given) and not off,
        nothing,
        "eval_steps",
        "evals_per_epoch",
        "eval_max_samples",
        "eval_iters",
    )
    idle(off, "Nothing is evaluated.", "eval_steps", "evals_per_epoch")
    for name in ("eval_steps", "save_steps"):
        idle(given.get(name) == 0, "0 is for none on the way.", name)
    alone = given.get("tensor_parallel_size", 1) == 1
    idle(
        alone and given.get("sequence_parallel") is True,
        "There is no tensor parallelism.",
        "sequence_parallel",
    )
    constant = str(given.get("lr_scheduler")).startswith("constant")
    idle(constant, "The learning rate is constant.", "lr_decay_iters", "min_lr")
    by_share = given.get("warmup_ratio") is not None and given.get("warmup_steps") == 0
    idle(by_share, "The warm-up is a share of the steps.", "warmup_steps")
    warm_up = given.get("warmup_steps") or given.get("warmup_ratio")
    idle(not warm_up, "There is no warm-up.", "lr_warmup_init")
    idle(not given.get("resume"), "No checkpoint is loaded.", "no_load_optim", "no_load_rng")
    idle(
        "a2a+p2p" not in str(given.get("cp_comm_type")),
        "It is for a2a+p2p.",
        "hierarchical_context_parallel_sizes",
    )
    dense = not given.get("num_moe_experts")
    idle(dense, "There are no experts.", *(name for name in given if name.startswith("moe_")))
    idle(not given.get("moe_expert_capacity_factor"), "No token is dropped.", "moe_token_drop_policy")
    silent = not given.get("use_wandb")
    idle(
        silent,
        "Weights & Biases is not asked for.",
        "wandb_project",
        "wandb_name",
        "wandb_entity",
        "wandb_mode",
    )
    return found


#: key -> {Megatron-LM's name of a value: longspan's name}
_VALUES = {
    "optimizer": {"adam": "adamw_torch_fused"},
    # "auto" takes the fastest kernel that is installed; "unfused" and "local" compute plain products.
    "attention_backend": {"flash": "auto", "fused": "auto", "unfused": "math", "local": "math"},
}


def _ours(name: str, value: Any) -> Any:
    return _VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value
