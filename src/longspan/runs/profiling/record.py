"""Records steps of the training loop on one rank under PyTorch's profiler."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from longspan.context_parallel.kernels.choose import select_kernel
from longspan.mesh.axes import axes_of_groups
from longspan.runs.profiling.labels import Call, label_tiles, labelled_exchanges
from longspan.runs.profiling.trace import STEP
from longspan.tensor_parallel.layers import local
from longspan.training.trainer import Trainer


class Recorder:
    """Records steps, as a callback of the loop: :meth:`after_step` is called after each of them.

    After ``warmup`` steps the profiler starts. The first recorded step is not counted, because in it the profiler
    itself starts, and memory that was allocated before is not in the trace. ``steps`` more steps are counted.

    Attributes:
        axes: name of each process group -> axis.
        calls: the exchanges of each recorded step.
        flops: the floating-point operations of attention's tiles in each recorded step.
        before: memory that was held when the last step began: address -> (bytes, component).
        gradients: addresses of the gradients after the last step.
        plain: seconds of the last step before the profiler starts; None if that is the first step, which is slow.
    """

    def __init__(self, trainer: Trainer, warmup: int, steps: int):
        run = trainer.run
        self.trainer, self.warmup, self.steps = trainer, warmup, steps
        self.axes = axes_of_groups(trainer.mesh, trainer.groups)
        self.calls: list[list[Call]] = []
        self.flops: list[int] = []
        self.before: dict[int, tuple[int, str]] = {}
        self.gradients: set[int] = set()
        self.plain: float | None = None
        self._before_plain: float | None = None
        choice = select_kernel(
            trainer.device,
            getattr(torch, run.precision.compute_dtype),
            run.model.kv_channels,
            run.config.attention_backend,
            run.config.deterministic_mode,
        )
        self.kernel_name = choice.kernel.name
        self._kernel = label_tiles(trainer.model, choice.kernel)
        self._done, self._calls = 0, list[Call]()
        self._until_the_end = ExitStack()
        self._label: Any = None
        activities = [ProfilerActivity.CPU]
        if trainer.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities, profile_memory=True)

    @property
    def all_steps(self) -> int:
        """The number of steps that the loop has to run."""
        return self.warmup + 1 + self.steps

    def after_step(self) -> None:
        """Starts the profiler, marks the steps in the trace, and stops the profiler."""
        self._done += 1
        if self._done < self.warmup:
            self._before_plain = time.perf_counter()
            return
        if self._done == self.warmup:
            if self._before_plain is not None:
                self.plain = time.perf_counter() - self._before_plain
            self._start()
        else:
            self._end_step()
        if self._done == self.all_steps - 1:
            self.before = held(self.trainer.model, self.trainer.optimizer)
        if self._done == self.all_steps:
            self._until_the_end.close()
            self._profiler.stop()
            self.gradients = {_place(p.grad) for p in self.trainer.model.parameters() if p.grad is not None}
            return
        self._label = record_function(f"{STEP}{self._done - self.warmup}")
        self._label.__enter__()

    def _start(self) -> None:
        self._kernel.take_flops()
        self._finish_device()
        # All ranks begin together, so that the first step has no other rank's start in it.
        dist.barrier()
        self._profiler.start()
        self._until_the_end.enter_context(labelled_exchanges(self.axes, self._calls))

    def _end_step(self) -> None:
        self._finish_device()
        self._label.__exit__(None, None, None)
        self.calls.append(list(self._calls))
        self._calls.clear()
        self.flops.append(self._kernel.take_flops())

    def _finish_device(self) -> None:
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.device)

    def export(self, path: Path) -> None:
        """Writes the Chrome trace, compressed where the name ends with .gz."""
        self._profiler.export_chrome_trace(str(path))


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, tuple[int, str]]:
    """The memory of parameters, gradients, optimizer state and buffers: address -> (bytes, component)."""
    found: dict[int, tuple[int, str]] = {}

    def add(x: Tensor, component: str) -> None:
        storage = local(x).untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes(), component

    for buffer in model.buffers():
        add(buffer, "buffers")
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                add(value, "optimizer state")
    for parameter in model.parameters():
        add(parameter, "parameters")
        if parameter.grad is not None:
            add(parameter.grad, "gradients")
    return found


def _place(x: Tensor) -> int:
    return local(x).untyped_storage().data_ptr()
