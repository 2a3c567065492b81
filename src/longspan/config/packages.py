"""Finds out which optional packages are installed, without importing them."""

import importlib.util


def has_package(name: str) -> bool:
    """Whether a package is installed. A folder of that name in the current directory does not count."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None
