"""``longspan.json``, a checkpoint's description: what was trained, to which step, and which run it fits."""

from __future__ import annotations

import functools
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import TypeAdapter, ValidationError

from longspan import __version__
from longspan.config.architecture import Architecture, key_of
from longspan.config.data import STREAM_KEYS
from longspan.config.run import Run
from longspan.config.schema import TrainConfig
from longspan.data import TokenDataset
from longspan.data.blend import BlendedDataset
from longspan.errors import UserError
from longspan.training.adapters import adapter_description, adapter_problems
from longspan.training.checkpoint_files import DESCRIPTION

#: keys that, besides the architecture's numbers, must be the same if a run is to continue as if never stopped
SETTINGS = ("sequence_len", "sample_packing", "seed", "val_set_size")
#: further such keys if the run trains on samples
SAMPLE_SETTINGS = ("train_on_inputs", "excess_length_strategy")

#: a number that is larger than any count of a run
MOST = 1 << 53


#: keys of the model that a checkpoint fits with any value of, and that an export needs
BESIDE = (
    "init_method_std",
    "max_position_embeddings",
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
)


def describe(path: Path, option: str = "resume") -> dict[str, Any]:
    """Reads ``longspan.json`` of a checkpoint, and checks the types and ranges of its values.

    Args:
        option: the option that named the checkpoint, for messages.

    Raises:
        UserError: the file cannot be read, or holds values that no run writes.
    """
    try:
        found = read_description(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{option}: {path / DESCRIPTION} cannot be read ({reason}). Use another checkpoint."
        ) from None
    if odd := _odd_values(found):
        raise UserError(
            f"{option}: {path / DESCRIPTION} holds what no run writes: {'; '.join(odd)}. Use another checkpoint."
        )
    return found


def read_description(path: Path) -> dict[str, Any]:
    """Reads the JSON of ``longspan.json``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no valid JSON, or lacks an entry that every checkpoint has.
    """
    text = (path / DESCRIPTION).read_text(encoding="utf-8")
    try:
        found = json.loads(text, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    needed = ("model", "settings", "global_batch_size", "step")
    if not isinstance(found, dict) or any(name not in found for name in needed):
        raise ValueError(f"it lacks {', '.join(needed)}")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _odd_values(found: dict[str, Any]) -> list[str]:
    """The invalid values of a description, a text each."""
    odd = [
        f"{name} {_short(found[name])}" for name in ("model", "settings") if not isinstance(found[name], dict)
    ]
    for name, least in (("step", 0), ("tokens", 0), ("global_batch_size", 1)):
        value = found.get(name, 0 if name == "tokens" else None)
        # A checkpoint that was converted from a model has no batch size.
        if not (_is_count(value, least) or (name == "global_batch_size" and value is None)):
            odd.append(f"{name} {_short(value)}")
    if not odd:
        values = _model_keys(found)
        odd += [f"{name} {_short(value)}" for name, value in values.items() if not _fits(name, value)]
    return odd + _odd_adapter(found.get("adapter"))


def _model_keys(description: dict[str, Any]) -> dict[str, Any]:
    """The config keys of the model that a description holds; an older description holds fewer of them."""
    values = description["model"] | description["settings"]
    values |= {name: description[name] for name in BESIDE if name in description}
    names = [*map(key_of, fields(Architecture)), "vocab_size", "sequence_len"]
    return {name: values[name] for name in names if name in values}


def refuse_class(description: dict[str, Any], path: Path, remedy: str) -> None:
    """Refuses a checkpoint of a model that transformers' own class computes, where only longspan's can be used.

    Raises:
        UserError: it is one.
    """
    if description["model"].get("model_implementation") == "transformers":
        raise UserError(
            f"{path} is a checkpoint of a model that transformers' own class computes (model_implementation: transformers). {remedy}"
        )


def config_of_model(description: dict[str, Any]) -> TrainConfig:
    """A config with the model's keys that :func:`describe` has read; the other keys have their defaults."""
    return TrainConfig.model_construct(**_model_keys(description))


def _odd_adapter(adapter: Any) -> list[str]:
    if adapter is None:
        return []
    if not isinstance(adapter, dict):
        return [f"adapter {_short(adapter)}"]
    kinds: dict[str, Any] = {
        "rank": int,
        "alpha": (int, float),
        "targets": list,
        "rslora": bool,
        "base_model": str,
        "base_fingerprint": str,
    }
    odd = [name for name, kind in kinds.items() if not isinstance(adapter.get(name), kind)]
    if "rank" not in odd and not _is_count(adapter["rank"], 1):
        odd.append("rank")
    if "targets" not in odd and not all(isinstance(target, str) for target in adapter["targets"]):
        odd.append("targets")
    return [f"{name} {_short(adapter.get(name))} of the adapter" for name in odd]


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < MOST


def _fits(name: str, value: Any) -> bool:
    """Whether the config's key of this name can have this value."""
    # Not every architecture has every field, so any key can be None.
    if value is None:
        return True
    if isinstance(value, int) and abs(value) >= MOST:
        return False
    try:
        _checker(name).validate_json(json.dumps(value), strict=True)
    except ValidationError:
        return False
    return True


@functools.cache
def _checker(name: str) -> TypeAdapter:
    field = TrainConfig.model_fields[name]
    kind: Any = Annotated[field.annotation, field]
    return TypeAdapter(kind)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def check_fits(path: Path, now: dict[str, Any], weights_only: bool, option: str = "resume") -> dict[str, Any]:
    """Refuses a checkpoint of another model or, unless ``weights_only``, of another batch or other data.

    Args:
        now: the description that this run would write.
        option: the option that named the checkpoint, for messages.

    Returns:
        The checkpoint's description.

    Raises:
        UserError: the checkpoint does not fit; every difference is listed.
    """
    then = describe(path, option)
    # If a checkpoint is older than a field of the architecture, its run used the default of that field.
    defaults = {key_of(one): one.default for one in fields(Architecture) if one.default is not MISSING}
    shapes = defaults | {"model_implementation": "native"} | then["model"]
    problems = [
        f"{option}: {path.name} is a checkpoint of another model: {name} was {shapes[name]!r}, the config says "
        f"{value!r}. Give the model's own value, or start without resume."
        for name, value in now["model"].items()
        if shapes.get(name, value) != value and name not in _sizes_of_no_layer(now["model"])
    ]
    problems += adapter_problems(option, path.name, then.get("adapter"), now["adapter"])
    if not weights_only:
        settings = defaults | then["settings"]
        if then["global_batch_size"] != now["global_batch_size"]:
            problems.append(
                f"{option}: {path.name} was trained with global_batch_size {then['global_batch_size']}, the config gives "
                f"{now['global_batch_size']}. A resume keeps the global batch: change micro_batch_size or "
                "gradient_accumulation_steps, or take only the weights with no_load_optim: true."
            )
        problems += [
            f"{option}: {path.name} was trained with {name} {settings.get(name)!r}, the config gives {value!r}. Keep it, "
            "or take only the weights with no_load_optim: true."
            for name, value in now["settings"].items()
            if settings.get(name) != value
        ]
    if problems:
        raise UserError(problems)
    return then


def _sizes_of_no_layer(model: dict[str, Any]) -> tuple[str, ...]:
    """Keys of a model's description that no layer uses: the size of a dense MLP where no layer has one."""
    if (letters := model.get("hybrid_override_pattern")) is not None:
        return () if "-" in letters else ("ffn_hidden_size",)
    pattern = model.get("moe_layer_freq", 1)
    everywhere = pattern == 1 if isinstance(pattern, int) else all(pattern)
    return ("ffn_hidden_size",) if model.get("num_moe_experts") and everywhere else ()


def implementation(config: TrainConfig) -> str:
    """What computes the model, ``native`` or ``transformers``; its parameters have other names there."""
    return "transformers" if config.model_implementation == "transformers" else "native"


def describe_model(config: TrainConfig) -> dict[str, Any]:
    """The part of a checkpoint's description that follows from the config alone."""
    model = Architecture.of(config)
    return {
        "model": model.keys("shapes")
        | {"vocab_size": config.vocab_size, "model_implementation": implementation(config)},
        "settings": {name: getattr(config, name) for name in SETTINGS} | model.keys("numbers"),
        **{
            name: getattr(model, name)
            for name in BESIDE
            if model.num_moe_experts is not None or not name.startswith("moe_")
        },
    }


def describe_run(run: Run, data: TokenDataset) -> dict:
    """The part of a checkpoint's description that follows from the config and the data."""
    about, config = describe_model(run.config), run.config
    weights = data.counts if isinstance(data, BlendedDataset) else None
    about["settings"] |= {"weights": list(weights) if weights else None, "split": config.split}
    about["settings"]["training tokens"] = data.num_tokens
    # These keys are null if they are off: older checkpoints, which do not have them, were made without them.
    about["settings"] |= {name: getattr(config, name) or None for name in (*STREAM_KEYS, "eod_token_id")}
    about["settings"] |= {name: getattr(config, name) for name in SAMPLE_SETTINGS if data.has_samples}
    return about | {
        "longspan": __version__,
        "torch": torch.__version__,
        "layout": run.sizes.equation(),
        "global_batch_size": run.batch.global_size,
        "adapter": adapter_description(run),
    }
