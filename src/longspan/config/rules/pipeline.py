"""The rules of pipelines: the schedule, the layers of each stage, and micro-batches enough."""

from __future__ import annotations

from longspan.config.schema import TrainConfig
from longspan.config.stages import SCHEDULES, SPLIT_BACKWARD, LayoutError, parse_layout
from longspan.errors import Problem

#: keys that divide layers among stages; the layout does it alone
SPLIT_KEYS = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


def pipeline_problems(config: TrainConfig) -> list[Problem]:
    """(keys, message) for keys of pipelines that contradict each other, do not fit or have no effect."""
    pp = config.pipeline_parallel_size
    if pp == 1:
        # A schedule and virtual stages come from the config that an earlier run of more stages has written, too.
        return [
            ((name, "pipeline_parallel_size"), f"{name} {getattr(config, name)} has no effect with pipeline_parallel_size 1. Leave it out, or use more stages.")
            for name in ("pipeline_layout", "use_tp_pp_dp_mapping", *SPLIT_KEYS)
            if getattr(config, name)
        ]  # fmt: skip
    return [*_schedule(config), *_split(config)]


def schedule_of(config: TrainConfig, micro_batches: int | None = None) -> str:
    """The schedule of a run: the one that is asked for, or the usual one for so many stages a rank.

    With fewer micro-batches than stages the order of 1f1b is that of gpipe, which torch takes there.
    """
    if config.pipeline_schedule is not None:
        return config.pipeline_schedule
    if virtual_size_of(config) > 1:
        return "interleaved"
    few = micro_batches is not None and micro_batches < config.pipeline_parallel_size
    return "gpipe" if few else "1f1b"


def virtual_size_of(config: TrainConfig) -> int:
    """Stages of each rank."""
    if config.pipeline_layout is not None and config.virtual_pipeline_parallel_size is None:
        stages = _layout(config)
        if isinstance(stages, list):
            return max(1, len(stages) // config.pipeline_parallel_size)
    several = SCHEDULES.get(config.pipeline_schedule or "1f1b", False)
    return config.virtual_pipeline_parallel_size or (2 if several else 1)


def _layout(config: TrainConfig) -> list[int] | LayoutError:
    assert config.pipeline_layout is not None
    try:
        return parse_layout(config.pipeline_layout, config.num_layers or 0, config.pipeline_parallel_size)
    except LayoutError as error:
        return error


def _schedule(config: TrainConfig) -> list[Problem]:
    found: list[Problem] = []
    name, pp = config.pipeline_schedule, config.pipeline_parallel_size
    virtual = config.virtual_pipeline_parallel_size
    keys = ("pipeline_schedule", "virtual_pipeline_parallel_size")
    if name is not None and virtual is not None and not SCHEDULES[name] and virtual > 1:
        text = (
            f"pipeline_schedule {name} with virtual_pipeline_parallel_size {virtual}: it has one stage a rank. Use interleaved, or "
            "leave the number out."
        )
        found.append((keys, text))
    if name is not None and SCHEDULES[name] and virtual == 1:
        text = f"pipeline_schedule {name} needs several stages a rank. Set virtual_pipeline_parallel_size: 2, or use 1f1b."
        found.append((keys, text))
    if name == "zbv" and virtual not in (None, 2):
        found.append((keys, f"pipeline_schedule zbv has 2 stages a rank, and virtual_pipeline_parallel_size is {virtual}. Leave it out."))  # fmt: skip
    if config.hybrid_context_parallel:
        text = (
            f"hybrid_context_parallel with pipeline_parallel_size {pp}: the micro-batches of a pipeline have one length, and those "
            "of hybrid context parallelism do not. Leave one of them out."
        )
        found.append((("hybrid_context_parallel", "pipeline_parallel_size"), text))
    if name in SPLIT_BACKWARD and config.torch_compile is True:
        text = f"pipeline_schedule {name} takes backward apart, which compiled code does not allow. Use interleaved, or torch_compile: false."
        found.append((("pipeline_schedule", "torch_compile"), text))
    return found


def _split(config: TrainConfig) -> list[Problem]:
    found: list[Problem] = []
    layers, pp = config.num_layers, config.pipeline_parallel_size
    if layers is None:
        return found
    if config.pipeline_layout is not None:
        given = [name for name in SPLIT_KEYS if getattr(config, name)]
        if given:
            text = f"pipeline_layout and {given[0]} both divide the layers among the stages. Keep one."
            found.append((("pipeline_layout", *given), text))
        stages = _layout(config)
        keys = ("pipeline_layout", "num_layers", "pipeline_parallel_size")
        if isinstance(stages, LayoutError):
            found.append((keys, f"pipeline_layout {config.pipeline_layout!r}: {stages}"))
        elif len(stages) != pp * virtual_size_of(config):
            text = (
                f"pipeline_layout has {len(stages)} stages, and pipeline_parallel_size {pp} x virtual_pipeline_parallel_size "
                f"{virtual_size_of(config)} are {pp * virtual_size_of(config)}. Leave the virtual size out: it follows from the layout."
            )
            found.append(((*keys, "virtual_pipeline_parallel_size"), text))
        elif len(stages) > pp and not SCHEDULES[schedule_of(config)] and config.pipeline_schedule is not None:
            text = f"pipeline_layout has {len(stages) // pp} stages a rank, and pipeline_schedule {config.pipeline_schedule} takes one. Use interleaved."
            found.append((("pipeline_layout", "pipeline_schedule"), text))
        return found
    ends = [config.decoder_first_pipeline_num_layers, config.decoder_last_pipeline_num_layers]
    taken = sum(n or 0 for n in ends)
    if taken > layers or (
        taken < layers and all(n is not None for n in ends) and pp * virtual_size_of(config) == 2
    ):
        text = (
            f"decoder_first_pipeline_num_layers {ends[0]} and decoder_last_pipeline_num_layers {ends[1]} of {layers} layers: the "
            "stages between them take the rest, and no layer is left over. Choose other numbers."
        )
        found.append((SPLIT_KEYS[:2], text))
    return found


def micro_batch_problems(config: TrainConfig, micro_batches: int) -> list[Problem]:
    """Too few micro-batches for a schedule, or a number that it cannot take."""
    pp = config.pipeline_parallel_size
    if pp == 1:
        return []
    name = schedule_of(config, micro_batches)
    keys = ("gradient_accumulation_steps", "pipeline_parallel_size", "pipeline_schedule")
    if name == "1f1b" and micro_batches < pp:
        text = (
            f"pipeline_schedule 1f1b with {micro_batches} micro-batches a step and {pp} stages: it needs one for each stage. Set "
            f"gradient_accumulation_steps: {pp} or more, or leave the schedule out."
        )
        return [(keys, text)]
    rounds = max(1, micro_batches // pp)
    if SCHEDULES[name] and name != "zbv" and micro_batches % rounds:
        text = (
            f"pipeline_schedule {name} with {micro_batches} micro-batches a step and {pp} ranks: it takes them in rounds of {pp}. Set "
            f"gradient_accumulation_steps: {rounds * pp}."
        )
        return [(keys, text)]
    return []
