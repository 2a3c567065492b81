"""From what the user wrote to what is run: arithmetic and the rules between keys.

``resolve`` fills in everything that follows from the config and the number of processes,
and refuses with all broken rules at once. It needs neither torch nor a process group.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from longspan.config.architecture import SHAPE_KEYS, Architecture, architecture_problems
from longspan.config.data_rules import data_problems, keeps_documents_apart
from longspan.config.hub import architecture_of
from longspan.config.hugging_face import export_problem
from longspan.config.lora import Lora, lora_of, lora_problems
from longspan.config.memory_rules import memory_problems
from longspan.config.model import TransformerConfig, cut_problems
from longspan.config.output_rules import output_problems
from longspan.config.parallel import MeshSizes
from longspan.config.parallel_rules import parallel_problems
from longspan.config.rope import rope_type, with_original_length
from longspan.config.schedule_rules import schedule_problems
from longspan.config.schema import TrainConfig
from longspan.errors import Problem, UserError


@dataclass(frozen=True)
class Run:
    """A config with its arithmetic done.

    Attributes:
        config: with architecture keys filled in from base_model.
        sizes: ranks an axis.
        micro_batch_size, accumulation, global_batch_size: sequences, micro-batches, sequences.
        sequence_parallel: what the key's default came to.
        model: the architecture; None while the vocabulary's size is not known.
    """

    config: TrainConfig
    sizes: MeshSizes
    micro_batch_size: int
    accumulation: int
    global_batch_size: int
    sequence_parallel: bool
    recompute: str

    @property
    def world_size(self) -> int:
        return self.sizes.world_size

    @property
    def pretrained(self) -> bool:
        """Do the weights come from base_model?"""
        return self.config.base_model is not None and not self.config.reinit_weights

    @property
    def lora(self) -> Lora | None:
        """The adapters that are trained beside frozen weights; None where all weights are trained."""
        return lora_of(self.config)

    def transformer_config(self, params_dtype=None) -> TransformerConfig:
        """The model's architecture and how it is cut."""
        model = Architecture.of(self.config)
        values = {one.name: getattr(model, one.name) for one in dataclasses.fields(model)}
        return TransformerConfig(params_dtype=params_dtype, **values, **self._parallel())

    @property
    def mlp_tiles(self) -> int | None:
        """Tiles of the MLP: 1 without ``tiled_mlp``; None: from the number of tokens, as they come."""
        return self.config.tiled_mlp_num_shards if self.config.tiled_mlp else 1

    @property
    def windows(self) -> list[int | None]:
        """The sliding windows of the layers, one a layer."""
        model = self.transformer_config()
        return [model.window_of_layer(number) for number in range(1, model.num_layers + 1)]

    @property
    def ranks_together(self) -> int:
        """Context parallel ranks that exchange heads in every layer; 1 where some layer moves keys alone."""
        model, cp = self.transformer_config(), self.sizes.cp
        types = {model.comm_type_of_layer(number) for number in range(1, model.num_layers + 1)}
        if cp == 1 or not types <= {"a2a", "a2a+p2p"}:
            return 1
        return cp if types == {"a2a"} else self.sizes.hierarchical_cp[0]

    def _parallel(self) -> dict:
        return dict(
            tensor_model_parallel_size=self.sizes.tp,
            context_parallel_size=self.sizes.cp,
            pipeline_model_parallel_size=self.sizes.pp,
            sequence_parallel=self.sequence_parallel,
            cp_comm_type=self.config.cp_comm_type,
            hierarchical_context_parallel_sizes=self.config.hierarchical_context_parallel_sizes,
            attention_backend=self.config.attention_backend,
            deterministic_mode=self.config.deterministic_mode,
        )


def processes_asked_for(config: TrainConfig) -> int:
    """The product of the parallel sizes: the number of processes when nobody says."""
    return (
        config.tensor_parallel_size
        * config.context_parallel_size
        * config.pipeline_parallel_size
        * (config.dp_shard_size or 1)
        * config.dp_replicate_size
    )


def resolve(
    config: TrainConfig,
    world_size: int | None = None,
    *,
    bad_keys: Iterable[str] = (),
    earlier: Iterable[str] = (),
) -> Run:
    """Checks the rules between keys and does the arithmetic.

    Args:
        world_size: processes; None takes the product of the parallel sizes.
        bad_keys: keys already found wrong: rules about them are not reported again.
        earlier: problems already found; raised together with the new ones.

    Raises:
        UserError: with all problems.
    """
    found: list[Problem] = []
    bad = set(bad_keys)
    if config.base_model is not None:
        try:
            # what the file says itself wins over base_model, key by key
            given = {k for k in config.model_fields_set if getattr(config, k) is not None}
            # what is known not to be at hand is not asked for again
            whole = architecture_of(config.base_model, network="base_model" not in bad)
            base = {k: v for k, v in whole.items() if k not in given}
            config = TrainConfig.model_validate(config.model_dump(exclude_unset=True) | base)
            config = _longer(config, whole, given)
        except ValidationError as error:
            for e in error.errors():
                found.append(
                    (
                        ("base_model",),
                        f"base_model: {e['loc'][0]} in its config.json: {e['input']!r} {e['msg']}.",
                    )
                )
        except UserError as error:
            found.append((("base_model",), str(error)))
            bad |= {"num_layers", "hidden_size", "num_attention_heads", "vocab_size", "reinit_weights"}
    world = world_size if world_size is not None else processes_asked_for(config)
    sizes = _sizes(config, world, found)
    micro, accumulation, total = _batch(config, sizes.dp, found)
    sequence_parallel = sizes.tp > 1 if config.sequence_parallel is None else config.sequence_parallel
    _required(config, found)
    found += data_problems(config)
    found += parallel_problems(config)
    found += output_problems(config)
    _positions(config, found)
    found += lora_problems(config)
    found += memory_problems(config)
    found += schedule_problems(config)
    if None not in (config.num_layers, config.hidden_size, config.num_attention_heads):
        found += _model_problems(config)
    messages = list(earlier) + [text for fields, text in found if not bad.intersection(fields)]
    if messages:
        raise UserError(messages)
    return Run(
        config, sizes, micro, accumulation, total, sequence_parallel and sizes.tp > 1, _recompute(config)
    )


def _longer(config: TrainConfig, base: dict[str, Any], given: set[str]) -> TrainConfig:
    """A model that trains on longer sequences than base_model was made for: what follows from base_model's own length."""
    length, scaling = base.get("max_position_embeddings"), config.rope_scaling
    if config.position_embedding_type != "rope":
        return config
    changes: dict[str, Any] = {}
    if scaling:
        changes["rope_scaling"] = with_original_length(scaling, length)
    if length is not None and "max_position_embeddings" not in given and rope_type(scaling) != "dynamic":
        changes["max_position_embeddings"] = max(length, config.sequence_len)
    return config.model_copy(update=changes)


def _positions(config: TrainConfig, found: list[Problem]) -> None:
    """The sequence against the positions the model knows."""
    most, length = config.max_position_embeddings, config.sequence_len
    if most is None or length <= most:
        return
    fields = ("sequence_len", "max_position_embeddings")
    if config.position_embedding_type == "rope" and rope_type(config.rope_scaling) == "dynamic":
        if keeps_documents_apart(config) or config.reset_position_ids or config.hybrid_context_parallel:
            text = (
                f"rope_scaling of type dynamic with sequence_len {length} beyond max_position_embeddings {most}: its frequencies "
                "follow the length of what is computed, and documents that are kept apart or counted by themselves have many. Use "
                "yarn or linear, or set sample_packing: false, so that every sequence has sequence_len tokens."
            )
            found.append((("rope_scaling", *fields), text))
        return
    what = "has a learned row for" if config.position_embedding_type == "learned_absolute" else "is made for"
    found.append(
        (
            fields,
            f"sequence_len {length} is larger than max_position_embeddings {most}, the positions the model {what}. "
            "Shorten the sequence, or raise max_position_embeddings (of a model that starts from random weights).",
        )
    )


def _sizes(config: TrainConfig, world: int, found: list[Problem]) -> MeshSizes:
    fixed = (
        config.tensor_parallel_size
        * config.context_parallel_size
        * config.pipeline_parallel_size
        * config.dp_replicate_size
    )
    shard = config.dp_shard_size or max(1, world // fixed)
    sizes = MeshSizes(
        tp=config.tensor_parallel_size,
        cp=config.context_parallel_size,
        pp=config.pipeline_parallel_size,
        dp_shard=shard,
        dp_replicate=config.dp_replicate_size,
        hierarchical_cp=tuple(config.hierarchical_context_parallel_sizes or ()),
    )
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
    """micro_batch_size, gradient_accumulation_steps, global_batch_size: any two give the third."""
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
        factors = " x ".join([*given, f"dp {dp}"])  # of what was given alone
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


def _required(config: TrainConfig, found: list[Problem]) -> None:
    if config.reinit_weights and config.base_model is None:
        found.append(
            (("reinit_weights",), "reinit_weights: true without base_model has no effect. Leave it out.")
        )
    missing = [k for k in ("num_layers", "hidden_size", "num_attention_heads") if getattr(config, k) is None]
    if missing:
        text = f"{', '.join(missing)}: missing. Give the architecture, or base_model: a folder that has it."
        found.append((tuple(missing), text))
    if config.learning_rate is None:
        found.append((("learning_rate",), "learning_rate: missing. A number such as 3e-4."))


def _model_problems(config: TrainConfig) -> list[Problem]:
    """The rules of the architecture and of its cut, and whether it can leave for Hugging Face."""
    model = Architecture.of(config)
    found = architecture_problems(model)
    if model.kv_channels is not None:
        found += cut_problems(
            model,
            tp=config.tensor_parallel_size,
            cp=config.context_parallel_size,
            cp_comm_type=config.cp_comm_type,
            hierarchy=config.hierarchical_context_parallel_sizes,
        )
    if config.export_hf and not found and (problem := export_problem(model)):
        found.append((("export_hf", *SHAPE_KEYS), f"export_hf: {problem} Set export_hf: false."))
    return found


def _recompute(config: TrainConfig) -> str:
    given = config.gradient_checkpointing
    return given if isinstance(given, str) else "full" if given else "none"
