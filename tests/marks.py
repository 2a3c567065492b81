"""Marks for some of a parametrisation's values."""

import pytest


def slow(values, *which):
    """The values; those among ``which`` are marked as slow."""
    return [pytest.param(value, marks=pytest.mark.slow) if value in which else value for value in values]
