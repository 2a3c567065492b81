"""torch.compile for the computation between two exchanges: pure functions, compiled once for all layers.

A module with such parts derives from :class:`Compilable` and calls them through :meth:`Compilable.part`. The
parts take this rank's plain tensors, never modules, DTensors or groups. So FSDP's hooks, recomputation and
every collective stay outside, and a compiled part serves all layers of the same shapes. When a shape changes
from one call to the next, the second call compiles a version for any size.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable

import torch

from longspan.errors import UserError

#: the backend of torch.compile, unless another is named
INDUCTOR = "inductor"


class Compilable:
    """A module with parts that can be compiled.

    Attributes:
        compiled: the backend of torch.compile by which the parts are compiled; None runs them as they are.
    """

    compiled: str | None = None

    def part(self, function: Callable) -> Callable:
        """The form of a function of tensors that this module runs: compiled or plain."""
        return compiled(function, self.compiled) if self.compiled else function


@functools.cache
def compiled(function: Callable, backend: str) -> Callable:
    """The compiled form of a function, one for the whole process."""
    return torch.compile(function, backend=backend)


def compile_parts(model: torch.nn.Module, on: bool | str = True) -> None:
    """Switches all parts of a model to their compiled form, or back.

    Args:
        on: True for Inductor, or the name of a backend of torch.compile: ``aot_eager`` generates no code, which
            takes most of the time.
    """
    backend = INDUCTOR if on is True else on or None
    for module in model.modules():
        if isinstance(module, Compilable):
            module.compiled = backend


def check_compiler(device: torch.device) -> None:
    """Refuses a machine on which torch.compile cannot work.

    Raises:
        UserError: there is no C++ compiler (CPU), no Triton, or no C compiler for its launchers (CUDA).
    """
    names = ("CXX", "g++", "clang++") if device.type == "cpu" else ("CC", "gcc", "clang")
    found = any(shutil.which(os.environ.get(name, "") if name.isupper() else name) for name in names)
    if not found:
        kind = "C++" if device.type == "cpu" else "C"
        raise UserError(
            f"torch_compile: true needs a {kind} compiler on {device.type}, and none of {', '.join(names[1:])} is on the "
            "path. Install one, or leave torch_compile out."
        )
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UserError(
                "torch_compile: true needs Triton on CUDA, and this torch finds none that fits this GPU. Install it "
                "(pip install triton), or leave torch_compile out."
            )
