"""Initial values of whole modules: every parameter by (seed, name, shape), the same at every layout (invariant I2)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from longspan.config.model import ModelParallelConfig
from longspan.tensor_parallel.layers import ParallelModule
from longspan.tensor_parallel.random import fill, initial_seed


def init_weights(
    model: nn.Module, seed: int, kind: type[ParallelModule] = ParallelModule, prefix: str = ""
) -> None:
    """Fills what a module's parallel layers hold by (seed, name, shape): the same at every layout.

    That is every parameter, and every buffer that is named in a layer's ``initial``.

    It serves a model of your own too: its layers get the names they have in it.

    Args:
        kind: fills such modules only.
        prefix: of the names, for a module that is a part of a larger one.
    """
    done: set[int] = set()
    for path, module in model.named_modules(prefix=prefix):
        if not isinstance(module, kind):
            continue
        for short, initial in module.initial.items():
            tensor = getattr(module, short)
            if id(tensor) not in done:  # tied ones are filled once
                done.add(id(tensor))
                fill(tensor, initial, seed, f"{path}.{short}")


@contextlib.contextmanager
def filled_by_name(
    module: nn.Module, config: ModelParallelConfig, tp_size: int, seed: int | None, prefix: str = ""
) -> Iterator[None]:
    """In a constructor, around making the parts: they are filled at the end, by their names in the whole module.

    The parts are made on ``meta``, where nothing is drawn, and get memory at the end. A module that is itself made on
    ``meta`` stays there: a larger module fills it, or its maker does.

    Args:
        seed: None takes ``model_parallel_seed``'s, else a number of the default generator.
        prefix: the module's name in a whole model.

    Raises:
        ValueError: there is no seed where there are copies of the weights, or one that would have no effect.
    """
    device = torch.get_default_device()
    draws = config.perform_initialization and device.type != "meta"
    if draws and seed is None:
        seed = initial_seed(tp_size)
    elif not draws and seed is not None:
        raise ValueError(
            f"seed={seed} has no effect: nothing is drawn on the meta device or with perform_initialization=False. Leave it "
            "out, and give the seed to longspan.tensor_parallel.init_weights(model, seed) once there is memory."
        )
    with torch.device("meta"):
        yield
    if device.type != "meta":
        module.to_empty(device=device)
    if draws:
        assert seed is not None
        init_weights(module, seed, prefix=prefix)
