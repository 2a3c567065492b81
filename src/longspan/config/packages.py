"""Which optional packages are installed; asking imports none."""

import importlib.util


def has_package(name: str) -> bool:
    """A folder of that name in the current directory, such as one of data called ``datasets``, is no package."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None
