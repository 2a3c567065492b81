"""Low-rank adapters (LoRA): what the keys ask for, the rules between them, and PEFT's ``adapter_config.json``.

A linear layer Y = X W^T with an adapter computes Y = X W^T + scale (X A^T) B^T, where W [output, input] is
frozen and A [rank, input], B [output, rank] are trained (Hu et al. 2021, https://arxiv.org/abs/2106.09685).
Needs no torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longspan.config.json_text import parse_json
from longspan.config.schema import TrainConfig
from longspan.errors import Problem, UserError, did_you_mean

#: linear layers of attention and MLP, by Hugging Face's names
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

#: what PEFT can say in an adapter_config.json that these adapters cannot do
_FOREIGN = (
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

#: ways of PEFT to initialise adapters that subtract them from the base model's weights (or quantise those): what is saved
#: belongs to weights that are saved nowhere. The first two are names that variants begin with.
_MOVES_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class Lora:
    """The adapters of a model.

    Attributes:
        rank: r, the inner size.
        alpha: the scale's numerator.
        targets: layers that get one, by Hugging Face's names, in the order of ``TARGETS``.
        rslora: scale by alpha / sqrt(r) (Kalajdzievski 2023) instead of alpha / r.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def description(self) -> dict[str, Any]:
        """As a checkpoint's description holds it: plain JSON."""
        return asdict(self) | {"targets": list(self.targets)}

    def peft_config(self, base_model: str) -> dict[str, Any]:
        """PEFT's ``adapter_config.json``; a base model in a folder is named by its whole path."""
        folder = Path(base_model)
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(folder.resolve()) if folder.is_dir() else base_model,
            "r": self.rank,
            "lora_alpha": int(self.alpha) if self.alpha == int(self.alpha) else self.alpha,
            "use_rslora": self.rslora,
            "target_modules": list(self.targets),
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "modules_to_save": None,
            "inference_mode": True,
        }


def lora_of(config: TrainConfig) -> Lora | None:
    """The adapters a config asks for, None for full training; the rules hold already."""
    if config.adapter is None:
        return None
    assert config.lora_r is not None
    asked = TARGETS if config.lora_target_linear else config.lora_target_modules or ()
    targets = tuple(name for name in TARGETS if name in asked)
    return Lora(config.lora_r, config.lora_alpha or config.lora_r, targets, config.peft_use_rslora)


def read_peft_config(folder: str | Path) -> tuple[Lora, str | None]:
    """Reads a folder of adapters in PEFT's format: the adapters and the base model it names.

    Raises:
        UserError: no such folder, another kind of adapter, or one with parts that are not supported.
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
    foreign = [f"{name} {data[name]!r}" for name in _FOREIGN if data.get(name)]
    foreign += [f"bias {data['bias']!r}"] if data.get("bias", "none") != "none" else []
    if foreign:
        raise UserError(f"{path} sets {', '.join(foreign)}, which is not supported: only plain LoRA is.")
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
    if targets == "all-linear":
        targets = TARGETS
    strange = (
        [targets] if isinstance(targets, str) else [str(t) for t in targets or ["none"] if t not in TARGETS]
    )
    if strange:
        raise UserError(f"{path} has target_modules {', '.join(strange)}; supported: {', '.join(TARGETS)}.")
    ordered = tuple(name for name in TARGETS if name in targets)
    return Lora(rank, alpha, ordered, bool(data.get("use_rslora"))), base


#: keys that speak of adapters -> their value that asks for nothing
KEYS: dict[str, Any] = {
    "lora_r": None,
    "lora_alpha": None,
    "lora_dropout": 0.0,
    "lora_target_modules": None,
    "lora_target_linear": False,
    "lora_model_dir": None,
    "peft_use_rslora": False,
}


def lora_problems(config: TrainConfig) -> list[Problem]:
    """The rules between the keys of adapters: (keys, message) for each that is broken."""
    if config.adapter is None:
        return [
            ((key, "adapter"), f"{key} {getattr(config, key)!r} has no effect without adapter: lora. Set it, or leave it out.")
            for key, off in KEYS.items()
            if getattr(config, key) != off
        ]  # fmt: skip
    found: list[Problem] = []
    if config.base_model is None:
        text = "adapter: lora needs base_model, the model whose weights stay as they are. Give one, or train all weights."
        found.append((("adapter", "base_model"), text))
    elif config.reinit_weights:
        text = "adapter: lora with reinit_weights: true would leave random weights as they are. Drop one of the two."
        found.append((("adapter", "reinit_weights"), text))
    if config.position_embedding_type == "learned_absolute":
        text = (
            "adapter: lora on a GPT-2: its query, key and value lie in one layer (c_attn), which adapters here do not reach. "
            "Train all weights, or take a Llama, Mistral or Qwen."
        )
        found.append((("adapter", "base_model"), text))
    if config.lora_r is None:
        found.append((("lora_r",), "lora_r: missing. adapter: lora needs the rank, e.g. lora_r: 16."))
    if config.lora_dropout:
        text = (
            f"lora_dropout {config.lora_dropout}: only 0 is supported. What is dropped would depend on how tokens and "
            "features are cut, and the loss must not. Set 0; weight_decay regularises too."
        )
        found.append((("lora_dropout",), text))
    found += _target_problems(config)
    if config.lora_model_dir is not None and not found:
        found += _start_problems(config)
    return found


def _target_problems(config: TrainConfig) -> list[Problem]:
    keys, given = ("lora_target_modules", "lora_target_linear"), config.lora_target_modules
    if given and config.lora_target_linear:
        text = "lora_target_modules and lora_target_linear are both given. Keep one: lora_target_linear stands for all."
        return [(keys, text)]
    if not given and not config.lora_target_linear:
        text = (
            "adapter: lora needs to know which layers get adapters. Give lora_target_linear: true for all, or "
            "lora_target_modules: [q_proj, v_proj], say."
        )
        return [(keys, text)]
    return [
        (keys[:1], f"lora_target_modules: {name!r} is none of {', '.join(TARGETS)}.{did_you_mean(name, TARGETS)}")
        for name in given or ()
        if name not in TARGETS
    ]  # fmt: skip


def _start_problems(config: TrainConfig) -> list[Problem]:
    """Adapters to start from must be those the config describes."""
    key = ("lora_model_dir",)
    try:
        there, _ = read_peft_config(config.lora_model_dir or "")
    except UserError as error:
        return [(key, f"lora_model_dir: {problem}") for problem in error.problems]
    here = lora_of(config)
    assert here is not None
    names = {"rank": "lora_r", "alpha": "lora_alpha", "targets": "the targets", "rslora": "peft_use_rslora"}
    shown = [(here.description()[field], there.description()[field], name) for field, name in names.items()]
    return [
        (key, f"lora_model_dir {config.lora_model_dir}: {name} there: {theirs}, in the config: {ours}. Give its own value.")
        for ours, theirs, name in shown
        if ours != theirs
    ]  # fmt: skip
