"""A disk that is full, as a process meets it."""

import contextlib
import resource

#: bytes that no file with the weights of a tiny model fits into; its small files do
WEIGHTS = 1 << 16


@contextlib.contextmanager
def full_disk(most):
    """Writing more than so many bytes into any one file raises OSError (``File too large``), in this process alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
