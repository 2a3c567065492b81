"""What a tensor is for, from the code that allocates it: the innermost function that the table lists."""

from __future__ import annotations

import sys
from types import CodeType

#: the buffers in which activations and gradients arrive from other stages
MESSAGES = "pipeline micro-batches"

#: (part of a file's path, beginning of a function's qualified name) -> component; the first match counts
PLACES = (
    ("longspan/context_parallel/move_keys", "_Keys", "context parallel buffers"),
    ("longspan/context_parallel/move_keys", "_Gradients", "context parallel buffers"),
    ("longspan/context_parallel/move_heads", "", "context parallel buffers"),
    ("longspan/context_parallel/move_rows", "", "context parallel buffers"),
    ("longspan/context_parallel/move_features", "", "context parallel buffers"),
    ("longspan/context_parallel/state", "", "context parallel buffers"),
    ("longspan/context_parallel/", "", "attention"),
    ("longspan/expert_parallel/dispatcher", "", "expert dispatch"),
    ("longspan/expert_parallel/", "", "experts"),
    ("longspan/tensor_parallel/cross_entropy", "", "logits and loss"),
    ("longspan/models/embedding", "OutputLayer", "logits and loss"),
    ("longspan/models/embedding", "", "embedding"),
    ("longspan/recurrent/", "", "recurrent"),
    ("longspan/models/mixers", "", "recurrent"),
    ("longspan/models/parts", "SelfAttention", "attention"),
    ("longspan/models/parts", "projected_heads", "attention"),
    ("longspan/models/parts", "MLP", "MLP"),
    ("longspan/tensor_parallel/mlp", "", "MLP"),
    ("longspan/models/memory/tiled", "", "MLP"),
    ("longspan/models/norm", "", "norms"),
    ("longspan/models/", "", "residual stream"),
    ("longspan/training/optimizer", "", "optimizer"),
    ("torch/optim/", "", "optimizer"),
    ("torch/distributed/fsdp/", "", "FSDP gathers"),
    ("longspan/pipeline", "", MESSAGES),
    ("torch/distributed/pipelining/", "", MESSAGES),
    ("longspan/training/sharding", "", "batches"),
    ("longspan/data/", "", "batches"),
    ("torch/autograd/graph", "_engine_run_backward", "gradients of activations"),
)

#: the order in which components are printed
COMPONENTS = tuple(
    dict.fromkeys(
        [
            "parameters",
            "gradients",
            "optimizer",
            *(component for _, _, component in PLACES),
            "scratch of kernels",
            "other",
        ]
    )
)

_found: dict[CodeType, str | None] = {}


def _component_of_code(code: CodeType) -> str | None:
    if code not in _found:
        path, name = code.co_filename.replace("\\", "/"), code.co_qualname
        _found[code] = next(
            (component for part, begin, component in PLACES if part in path and name.startswith(begin)), None
        )
    return _found[code]


def component_of_caller(depth: int = 1) -> str:
    """The component of the code that is running, without the innermost ``depth`` functions."""
    frame = sys._getframe(depth)
    while frame is not None:
        component = _component_of_code(frame.f_code)
        if component is not None:
            return component
        frame = frame.f_back  # type: ignore[assignment]
    return "other"
