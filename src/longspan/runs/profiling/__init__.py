"""``longspan profile``: a few steps of a training under PyTorch's profiler, and what they say about time and memory."""
