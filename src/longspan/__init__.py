"""longspan trains large language models on long context, on plain PyTorch.

``import longspan`` needs no GPU and imports torch only when a name that needs it is used.
"""

__version__ = "0.1.0"

_NAMES = {
    "AttnMaskType": "longspan.config.model",
    "ModelParallelConfig": "longspan.config.model",
    "TransformerConfig": "longspan.config.model",
    "TrainConfig": "longspan.config.schema",
    "Run": "longspan.config.run",
    "UserError": "longspan.errors",
    "finalize_model_grads": "longspan.gradients",
    "initialize": "longspan.megatron",
    "get_args": "longspan.megatron",
    "get_timers": "longspan.megatron",
    "load": "longspan.runs.api",
    "train": "longspan.runs.api",
    "verify": "longspan.runs.api",
    "evaluate": "longspan.runs.api",
}

__all__ = [*_NAMES, "__version__"]


def __getattr__(name: str):
    if name in _NAMES:
        import importlib

        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'longspan' has no attribute {name!r}")
