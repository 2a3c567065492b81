"""``longspan env``: what a bug report needs."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from longspan.errors import UserError


def run(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in ("--help", "-h"):
        print("usage: longspan env\n\nPrints versions and devices.")
        return 0
    if arguments:
        raise UserError(f"longspan env takes no arguments; found {arguments[0]!r}.")
    import torch

    rows = {"python": platform.python_version(), "platform": platform.platform()}
    for package in (
        "longspan",
        "torch",
        "numpy",
        "pydantic",
        "tokenizers",
        "safetensors",
        "transformers",
        "flash-attn",
    ):
        try:
            rows[package] = version(package)
        except PackageNotFoundError:
            rows[package] = "not installed"
    rows["cores"] = str(os.cpu_count())
    rows["cuda"] = torch.version.cuda or "none"
    for i in range(torch.cuda.device_count()):
        rows[f"gpu {i}"] = torch.cuda.get_device_name(i)
    for name, value in rows.items():
        print(f"{name:<14} {value}")
    return 0
