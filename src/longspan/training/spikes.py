"""Losses far above those before them: a sign of bad data, or of a learning rate that is too high."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable

#: number of losses that a loss is compared with, at most and at least
WINDOW = (128, 32)
#: a loss that is above the mean by less than this share of it is no spike, however little the others vary
LEAST = 0.05


class LossSpikes:
    """Compares each loss with the mean of those before it, in units of their standard deviation.

    Args:
        sigma: ``loss_spike_sigma``; 0 finds nothing.

    Attributes:
        losses: the last losses (nats), for the checkpoint.
    """

    def __init__(self, sigma: float):
        self.sigma = sigma
        self.losses: deque[float] = deque(maxlen=WINDOW[0])

    def restart(self, losses: Iterable[float]) -> None:
        """Takes the losses that a checkpoint has."""
        self.losses = deque(losses, maxlen=WINDOW[0])

    def add(self, loss: float) -> float | None:
        """Takes a step's loss. Returns the mean of those before it if the loss is a spike."""
        mean = None
        if self.sigma and len(self.losses) >= WINDOW[1]:
            mean = statistics.fmean(self.losses)
            above = max(self.sigma * statistics.pstdev(self.losses, mean), LEAST * abs(mean))
            mean = mean if loss > mean + above else None
        self.losses.append(loss)
        return mean
