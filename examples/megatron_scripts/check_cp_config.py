"""Prints the layout: the sizes of all axes, and each rank's place on them and context parallel group.

    python -m torch.distributed.run --nproc-per-node 8 check_cp_config.py \
        --tensor-model-parallel-size 2 --context-parallel-size 2
    python check_cp_config.py                                                    (one process)

Without torchrun there is one process, so that larger sizes are refused with the number of processes that they
need; a misspelt flag is refused with the nearest name. In the notes each rank prints its own lines at the
same time, and the import (``from megatron import initialize_megatron``) does not exist. No model is needed:
no flag has to be given. (``longspan layout CONFIG`` shows which tokens each rank holds, without any process.)
"""

import time

import torch.distributed as dist

import longspan
from longspan import parallel_state


def print_cp_config():
    """Prints the layout on rank 0. Returns a dict for each rank."""
    mine = {
        "TP": parallel_state.get_tensor_model_parallel_rank(),
        "CP": parallel_state.get_context_parallel_rank(),
        "DP": parallel_state.get_data_parallel_rank(),
        "PP": parallel_state.get_pipeline_model_parallel_rank(),
        "CP group": parallel_state.get_context_parallel_global_ranks(),
    }
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    if parallel_state.is_rank_0():
        sizes = {
            "TP": parallel_state.get_tensor_model_parallel_world_size(),
            "CP": parallel_state.get_context_parallel_world_size(),
            "DP": parallel_state.get_data_parallel_world_size(),
            "PP": parallel_state.get_pipeline_model_parallel_world_size(),
        }
        product = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        print(f"{product} = {len(ranks)} process{'es' * (len(ranks) > 1)}")
        for rank, place in enumerate(ranks):
            print(f"rank {rank:3}: " + ", ".join(f"{name} {value}" for name, value in place.items()))
    return ranks


def main():
    longspan.initialize()
    return print_cp_config()


if __name__ == "__main__":
    main()
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.5)  # gloo's threads let go of the last tensors; see gpt_loop.py
