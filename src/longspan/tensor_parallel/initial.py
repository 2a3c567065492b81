"""Initial values of whole modules. Each parameter's depend on (seed, name, shape) only (invariant I2)."""

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
    """Fills the tensors of a module's parallel layers by (seed, name, shape), the same at every layout.

    These are all parameters and buffers that are named in a layer's ``initial``. The function also works for
    a model of your own: a tensor's name is its name in this model.

    Args:
        kind: only layers of this class are filled.
        prefix: prefix of the names, for a module that is a part of a larger module.
    """
    done: set[int] = set()
    for path, module in model.named_modules(prefix=prefix):
        if not isinstance(module, kind):
            continue
        for short, initial in module.initial.items():
            tensor = getattr(module, short)
            # A tied tensor is filled once.
            if id(tensor) not in done:
                done.add(id(tensor))
                fill(tensor, initial, seed, f"{path}.{short}")


def init_buffers(model: nn.Module) -> None:
    """Fills the buffers of a module's parallel layers, which need no seed: for weights that come from elsewhere."""
    for module in model.modules():
        if isinstance(module, ParallelModule):
            for short, initial in module.initial.items():
                if short in module._buffers:
                    fill(getattr(module, short), initial, 0, short)


@contextlib.contextmanager
def filled_by_name(
    module: nn.Module, config: ModelParallelConfig, tp_size: int, seed: int | None, prefix: str = ""
) -> Iterator[None]:
    """A context for the part of a constructor that makes a module's parts; it fills them at its end.

    The values depend on the parts' names in the whole module. The parts are made on ``meta``, where nothing
    is drawn, and get memory at the end. If the module itself is made on ``meta``, it stays there, and a
    larger module or the caller fills it.

    Args:
        seed: None takes the seed of ``model_parallel_seed``, or else a number of the default generator.
        prefix: the module's name in a whole model.

    Raises:
        ValueError: there is no seed although other ranks hold copies of the weights, or a seed would have no
            effect.
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
