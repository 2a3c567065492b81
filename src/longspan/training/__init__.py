"""The training loop and what it writes: optimizer, metrics, progress, checkpoints."""
