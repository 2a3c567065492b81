"""Kernels of recurrent layers: their protocols, PyTorch's own, those of installed packages, and the choice."""
