"""Moves between tensor parallel regions, with Megatron's names.

n is the tensor parallel size, s the length of the local sequence, and h the hidden size:

    copy_to_tensor_model_parallel_region            [s, b, h]   -> [s, b, h]     backward: sum
    reduce_from_tensor_model_parallel_region        partial     -> sum           backward: identity
    scatter_to_tensor_model_parallel_region         [.., h]     -> [.., h/n]     backward: gather
    gather_from_tensor_model_parallel_region        [.., h/n]   -> [.., h]       backward: own part
    scatter_to_sequence_parallel_region             [s, ..]     -> [s/n, ..]     backward: gather
    gather_from_sequence_parallel_region            [s/n, ..]   -> [s, ..]       backward: sum and split
    reduce_scatter_to_sequence_parallel_region      partial [s, ..] -> [s/n, ..] backward: gather
    all_gather_last_dim_from_tensor_parallel_region     [.., h/n]   -> [.., h]   backward: sum and split
    reduce_scatter_last_dim_to_tensor_parallel_region   partial [.., h] -> [.., h/n] backward: gather
    all_to_all_sp2hp                                [t/n, h]    -> [t, h/n]      backward: all_to_all_hp2sp
    all_to_all_hp2sp                                [t, h/n]    -> [t/n, h]      backward: all_to_all_sp2hp

These are the f and g operators of Shoeybi et al. 2019 (Megatron-LM) and their sequence parallel
forms of Korthikanti et al. 2022. ``group`` is the tensor parallel group; None takes the
installed group.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.mesh import collectives
from longspan.mesh.default_groups import process_groups


def tensor_parallel_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The given group, or the installed tensor parallel group."""
    return group if group is not None else process_groups().tp


def copy_to_tensor_model_parallel_region(x: Tensor, group=None) -> Tensor:
    return collectives.copy(x, tensor_parallel_group(group))


def reduce_from_tensor_model_parallel_region(x: Tensor, group=None) -> Tensor:
    return collectives.reduce(x, tensor_parallel_group(group))


def scatter_to_tensor_model_parallel_region(x: Tensor, group=None) -> Tensor:
    return collectives.scatter(x, tensor_parallel_group(group), dim=x.dim() - 1)


def gather_from_tensor_model_parallel_region(x: Tensor, group=None) -> Tensor:
    return collectives.gather(x, tensor_parallel_group(group), dim=x.dim() - 1)


def scatter_to_sequence_parallel_region(x: Tensor, group=None) -> Tensor:
    return collectives.scatter(x, tensor_parallel_group(group), dim=0)


def gather_from_sequence_parallel_region(
    x: Tensor, tensor_parallel_output_grad: bool = True, group=None
) -> Tensor:
    """[s/n, ..] -> [s, ..].

    Args:
        tensor_parallel_output_grad: True if the next layer is tensor parallel: the ranks' gradients
            differ then and are summed. False if all ranks compute the same from the result.
    """
    move = collectives.all_gather if tensor_parallel_output_grad else collectives.gather
    return move(x, tensor_parallel_group(group), dim=0)


def reduce_scatter_to_sequence_parallel_region(x: Tensor, group=None) -> Tensor:
    return collectives.reduce_scatter(x, tensor_parallel_group(group), dim=0)


def all_to_all(
    group: dist.ProcessGroup | None,
    input: Tensor,
    output_split_sizes: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
) -> Tensor:
    """Sends rows to every rank of the group, with autograd: :func:`longspan.mesh.collectives.all_to_all`."""
    return collectives.all_to_all(input, tensor_parallel_group(group), output_split_sizes, input_split_sizes)


def all_gather_last_dim_from_tensor_parallel_region(x: Tensor, group=None) -> Tensor:
    return collectives.all_gather(x, tensor_parallel_group(group), dim=x.dim() - 1)


def reduce_scatter_last_dim_to_tensor_parallel_region(x: Tensor, group=None) -> Tensor:
    return collectives.reduce_scatter(x, tensor_parallel_group(group), dim=x.dim() - 1)


def all_to_all_sp2hp(x: Tensor, group=None) -> Tensor:
    """From cut by tokens to cut by features: [t/n, h] -> [t, h/n]."""
    group = tensor_parallel_group(group)
    n = dist.get_world_size(group)
    return collectives.all_to_all(torch.cat(x.chunk(n, dim=-1)), group)


def all_to_all_hp2sp(x: Tensor, group=None) -> Tensor:
    """From cut by features to cut by tokens: [t, h/n] -> [t/n, h]."""
    group = tensor_parallel_group(group)
    n = dist.get_world_size(group)
    return torch.cat(collectives.all_to_all(x, group).chunk(n), dim=-1)
