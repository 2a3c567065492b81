"""Mixture of experts: the router, what balances it, and experts that are spread over ranks."""

from longspan.expert_parallel.experts import GroupedMLP
from longspan.expert_parallel.layer import MoELayer
from longspan.expert_parallel.router import MoERouter

__all__ = ["GroupedMLP", "MoELayer", "MoERouter"]
