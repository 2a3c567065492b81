"""Low-rank adapters (LoRA): the adapters that a config describes, and PEFT's ``adapter_config.json``.

A linear layer Y = X W^T with an adapter computes Y = X W^T + scale (X A^T) B^T, where W [output, input] is
frozen and A [rank, input], B [output, rank] are trained (Hu et al. 2021, https://arxiv.org/abs/2106.09685).
Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longspan.config.json_text import parse_json
from longspan.config.recurrent import LETTERS, is_recurrent, mixers_of
from longspan.config.schema import TrainConfig
from longspan.errors import UserError

#: the linear layers of attention and MLP, by Hugging Face's names
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: the projections of a recurrent layer
RECURRENT_TARGETS = ("in_proj", "out_proj")
ALL_TARGETS = (*TARGETS, *RECURRENT_TARGETS)
#: PEFT's word for all linear layers but the output layer
ALL_LINEAR = "all-linear"
#: Hugging Face's names of parts of a target, where the name alone does not give the target
_PARTS = {
    **{name: name for name in ALL_TARGETS},
    **{f"self_attn.{name}": name for name in TARGETS},
    **{f"in_proj_{part}": "in_proj" for part in ("qkvz", "ba", "qkv", "z", "b", "a")},
    **{f"linear_attn.{part}_proj": "in_proj" for part in "qkvgba"},
    "linear_attn.o_proj": "out_proj",
}

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

#: Fields of PEFT's adapter_config.json that request what these adapters do not support.
_UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "fan_in_fan_out",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)

#: PEFT's ways to initialise adapters that change the base model's weights: the initial adapters are
#: subtracted from the weights, or the weights are quantised. The saved adapters fit only the changed
#: weights, which are not saved. The first two are the beginnings of the names of variants.
_MOVES_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class Lora:
    """The adapters of a model.

    Attributes:
        rank: r, the inner size.
        alpha: the scale's numerator.
        targets: the layers that get an adapter, in the order of ``ALL_TARGETS``; of a model that transformers' class
            computes, names of its linear layers, or ``ALL_LINEAR``.
        rslora: the scale is alpha / sqrt(r) (Kalajdzievski 2023) instead of alpha / r.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def description(self) -> dict[str, Any]:
        """The adapters as plain JSON, for a checkpoint's description."""
        return asdict(self) | {"targets": list(self.targets)}

    def peft_config(
        self, base_model: str, modules: Callable[[str], Sequence[str]] = lambda target: [target]
    ) -> dict[str, Any]:
        """PEFT's ``adapter_config.json``; a base model in a local folder is named by its absolute path.

        Args:
            modules: target -> Hugging Face's modules of it (``Family.adapter_modules``).
        """
        folder = Path(base_model)
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(folder.resolve()) if folder.is_dir() else base_model,
            "r": self.rank,
            "lora_alpha": int(self.alpha) if self.alpha == int(self.alpha) else self.alpha,
            "use_rslora": self.rslora,
            "target_modules": [module for target in self.targets for module in modules(target)],
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "modules_to_save": None,
            "inference_mode": True,
        }


def lora_of(config: TrainConfig) -> Lora | None:
    """The adapters that a config describes; None if all weights are trained. The rules must hold already."""
    if config.adapter is None:
        return None
    assert config.lora_r is not None
    if config.model_implementation == "transformers":
        named = (ALL_LINEAR,) if config.lora_target_linear else tuple(config.lora_target_modules or ())
        return Lora(config.lora_r, config.lora_alpha or config.lora_r, named, config.peft_use_rslora)
    asked = linear_targets(config) if config.lora_target_linear else config.lora_target_modules or ()
    targets = tuple(name for name in ALL_TARGETS if name in asked)
    return Lora(config.lora_r, config.lora_alpha or config.lora_r, targets, config.peft_use_rslora)


def linear_targets(config: TrainConfig) -> list[str]:
    """All targets that a model has and that PEFT accepts for it."""
    pattern = config.hybrid_override_pattern
    mixers = mixers_of(config.layer_types, pattern)
    mlp = pattern is None or any(LETTERS[letter].mlp for letter in pattern if letter in LETTERS)
    found = [*TARGETS[:4]] if mixers is None or "attention" in mixers else []
    if mlp:
        found += [name for name in TARGETS[4:] if name != "gate_proj" or config.gated_linear_unit]
    if not is_recurrent(config.layer_types, pattern):
        return found
    # PEFT refuses adapters on the output projection of Mamba-2, whose kernels read its weight alone.
    return [*found, "in_proj"] if "mamba" in (mixers or ()) else [*found, *RECURRENT_TARGETS]


def read_peft_config(folder: str | Path) -> tuple[Lora, str | None]:
    """Reads a folder of adapters in PEFT's format.

    Returns:
        (the adapters, the base model that they name or None).

    Raises:
        UserError: the folder holds no such file, another kind of adapter, or parts that are not supported.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise UserError(
            f"{folder}: there is no {CONFIG_FILE} in it. Give a folder of adapters in PEFT's format, such as OUTPUT_DIR/hf of a "
            "run with adapter: lora."
        )
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
        kind, rank, alpha = data["peft_type"], int(data["r"]), float(data["lora_alpha"])
        targets, base = data["target_modules"], data.get("base_model_name_or_path")
        if rank < 1 or not math.isfinite(alpha) or not isinstance(base, str | None):
            raise ValueError(f"r {rank}, lora_alpha {alpha}, base_model_name_or_path {base!r}")
        if not isinstance(targets, str | list | None):
            raise TypeError(f"target_modules {targets!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}).") from None
    if kind != "LORA":
        raise UserError(f"{path} holds adapters of the kind {kind}; only LORA is supported.")
    unsupported = [f"{name} {data[name]!r}" for name in _UNSUPPORTED if data.get(name)]
    unsupported += [f"bias {data['bias']!r}"] if data.get("bias", "none") != "none" else []
    if unsupported:
        raise UserError(f"{path} sets {', '.join(unsupported)}, which is not supported: only plain LoRA is.")
    start = data.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVES_THE_BASE):
        convert = "path_initial_model_for_weight_conversion=FOLDER_OF_THE_ADAPTERS_BEFORE_TRAINING"
        remedy = f"Let PEFT write them as plain LoRA: model.save_pretrained(FOLDER, {convert})."
        if start.lower() == "loftq":
            remedy = "Merge them with PEFT, into the quantised weights they were trained beside (merge_and_unload)."
        raise UserError(
            f"{path} sets init_lora_weights {start!r}: its adapters belong to base weights that PEFT changed when it made them, "
            f"and beside the base model's own they give nonsense. {remedy}"
        )
    if targets == ALL_LINEAR:
        targets = TARGETS
    strange = (
        [targets] if isinstance(targets, str) else [str(t) for t in targets or ["none"] if t not in _PARTS]
    )
    if strange:
        raise UserError(
            f"{path} has target_modules {', '.join(strange)}; supported: {', '.join(ALL_TARGETS)}, and the parts of the last two "
            "that a model's modules have."
        )
    asked = {_PARTS[name] for name in targets}
    ordered = tuple(name for name in ALL_TARGETS if name in asked)
    return Lora(rank, alpha, ordered, bool(data.get("use_rslora"))), base
