"""A Transformer block on TP 2 x CP 4, and an exchange between context parallel ranks, on 8 processes.

    bash launch_cp_demo.sh
    python -m torch.distributed.run --nproc-per-node 8 cp_demo_minimal.py        (the same)

The first demo compares the block's output with that of one process, the second an all-to-all with the slice
that it has to give. Where the script differs from the notes that it follows:

- ``initialize_model_parallel`` makes the groups. The notes only start the process group, so that every getter
  fails.
- The input is one sequence, the same on every rank, of which each rank takes its rows: zigzag over the
  context parallel ranks, and with sequence parallelism that part again over the tensor parallel ranks. The
  notes draw other numbers on every rank and leave the second cut out, so that their ranks compute on no
  common sequence.
- ``model_parallel_seed`` gives all ranks the same weights.
- The sum over the ranks is used: the notes reduce a temporary tensor and print each rank's own sum.
- The ranks of a context parallel group come from ``get_context_parallel_group()``. The formula of the notes
  gives [0, 4] on the first four ranks and [1, 5] on the others: two ranks instead of four, and most ranks are
  not in their own list. ``new_group`` may also hang where ranks pass different lists.
- An error ends the script. The notes print it and end with exit code 0.
"""

import dataclasses
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from longspan import TransformerConfig, parallel_state
from longspan.context_parallel import SequenceLayout
from longspan.models import TransformerBlock
from longspan.tensor_parallel import (
    all_to_all,
    gather_from_sequence_parallel_region,
    model_parallel_seed,
    scatter_to_sequence_parallel_region,
)

TP, CP = 2, 4
SEQUENCE, BATCH, HIDDEN = 512, 2, 512


def demo_cp_attention(device):
    """Returns the largest difference between the block's output on all ranks and on one process."""
    rank = dist.get_rank()
    config = TransformerConfig(
        num_layers=2,
        hidden_size=HIDDEN,
        num_attention_heads=8,
        ffn_hidden_size=2048,
        kv_channels=64,
        tensor_model_parallel_size=TP,
        context_parallel_size=CP,
        sequence_parallel=True,
        cp_comm_type="p2p",
    )
    whole = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=torch.Generator().manual_seed(0)).to(device)
    layout = SequenceLayout.zigzag(SEQUENCE, CP)
    rows = layout.shard(whole, parallel_state.get_context_parallel_rank())  # [s / cp, b, h]
    hidden_states = scatter_to_sequence_parallel_region(rows)  # [s / cp / tp, b, h]
    with torch.device(device):
        block = TransformerBlock(config=config, pre_process=True, post_process=True)
    with torch.no_grad():
        output, _ = block(hidden_states=hidden_states, attention_mask=None)
        joined = gather_from_sequence_parallel_region(output)  # [s / cp, b, h]
        joined = layout.unshard(joined, parallel_state.get_context_parallel_group())  # [s, b, h]
        expected = on_one_process(config, whole)
    difference = (joined - expected).abs().max().item()

    # Summed over the context parallel ranks, each of which has some tokens: the sum over the whole output.
    # The sum is of absolute values, because a LayerNorm gives features that add up to 0.
    total = gather_from_sequence_parallel_region(output).double().abs().sum()
    dist.all_reduce(total, group=parallel_state.get_context_parallel_group())
    if rank == 0:
        print(f"TP {TP} x CP {CP}: a sequence of {SEQUENCE} tokens, {len(hidden_states)} rows on each rank")
        alone = expected.double().abs().sum().item()
        print(f"sum of the output's absolute values {total.item():.3f}, on one process {alone:.3f}")
        print(f"largest difference from one process: {difference:.2e}", flush=True)
    return difference


def on_one_process(config, whole):
    """The output of the same block for the whole sequence: this rank alone has all of the weights."""
    groups = parallel_state.get_process_groups()
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    mesh = DeviceMesh.from_group(alone, whole.device.type)
    config = dataclasses.replace(
        config, tensor_model_parallel_size=1, context_parallel_size=1, sequence_parallel=False
    )
    groups = dataclasses.replace(groups, tp=alone, cp=alone, tp_mesh=mesh)
    with torch.device(whole.device):
        # Initial weights follow the seed and their names, so that this block has the same ones.
        return TransformerBlock(config=config, pg_collection=groups)(whole)[0]


def demo_cp_communication(device):
    """The exchange of a2a, [s / cp, b, h] -> [s, b, h / cp]. Returns whether the result is exact."""
    group, rank = parallel_state.get_context_parallel_group(), parallel_state.get_context_parallel_rank()
    whole = torch.randn(256, BATCH, HIDDEN, generator=torch.Generator().manual_seed(1)).to(device)
    data = SequenceLayout.contiguous(256, CP).shard(whole, rank)  # [s / cp, b, h]
    width = HIDDEN // CP
    pieces = torch.cat(data.reshape(-1, HIDDEN).split(width, dim=1))  # piece i is for rank i
    output = all_to_all(group, pieces).reshape(256, BATCH, width)
    exact = torch.equal(output, whole[..., rank * width : (rank + 1) * width])
    if dist.get_rank() == 0:
        print(f"all-to-all over {CP} ranks: {tuple(data.shape)} -> {tuple(output.shape)}, exact: {exact}")
    return exact


def main():
    """Runs both demos. Returns their results; ends with exit code 1 if one of them is wrong."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        parallel_state.initialize_model_parallel(TP, context_parallel_size=CP, device_type=device)
    except ValueError as error:
        raise SystemExit(f"this demo needs {TP * CP} processes (launch_cp_demo.sh): {error}") from None
    model_parallel_seed(1234)
    difference, exact = demo_cp_attention(device), demo_cp_communication(device)
    if difference > 1e-4 or not exact:
        raise SystemExit(1)
    return difference, exact


if __name__ == "__main__":
    main()
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.5)  # gloo's threads let go of the last tensors; see gpt_loop.py
