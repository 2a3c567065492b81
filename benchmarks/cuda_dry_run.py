"""The CUDA paths without a GPU: shapes, dtypes and devices of kernels and whole models under FakeTensor.

    make cuda-dry-run
    python benchmarks/cuda_dry_run.py [--tp 2] [--cp 2]

Tensors are fake ones on device ``cuda`` and the process group is a fake one, so nothing is computed and nothing
travels; what is held is that every operator takes what it is given and that gradients come out like their inputs.
With a CPU build of torch, which has no such device, the kernels are held on ``meta`` and the models on ``cpu``.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from ranks_in_turn import Rank
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from longspan import TransformerConfig
from longspan.config.sizes import MeshSizes
from longspan.context_parallel import Schedule, SequenceLayout
from longspan.context_parallel.calls import calls_of
from longspan.context_parallel.kernels.choose import select_kernel
from longspan.mesh.mesh import ParallelMesh
from longspan.models import GPTModel, embedding

CUDA = torch.device("cuda", 0)
# autograd and indexing on CUDA tensors need a build that has CUDA, fake ones too
HAS_CUDA = torch.version.cuda is not None
KERNELS_ON = CUDA if HAS_CUDA else torch.device("meta")
MODELS_ON = CUDA if HAS_CUDA else torch.device("cpu")


#: recurrent mixer -> its sizes
RECURRENT = {
    "mamba": {"mamba_num_heads": 8, "mamba_head_dim": 32, "mamba_num_groups": 4, "mamba_state_dim": 16},
    "gated_delta": {
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 32,
    },
}


@contextlib.contextmanager
def world(size: int) -> Iterator[None]:
    """Rank 0 of a process group whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def pretend() -> Iterator[None]:
    """Hopper's abilities for a machine without a GPU, which what chooses kernels reads; ids without values are valid."""
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(embedding, "check_ids", return_value=None),
    ):
        yield


def alike(name: str, got: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raises where shape, dtype or device differ."""
    found = (tuple(got.shape), got.dtype, got.device)
    wanted = (tuple(like.shape), dtype or like.dtype, like.device)
    if found != wanted:
        raise AssertionError(f"{name}: {found}, expected {wanted}")


def kernel(
    fake: FakeTensorMode, name: str, cu: list[int], window: int | None, ranks: int, heads: tuple[int, int]
) -> None:
    """Forward and backward of one backend over a pack, every rank in turn."""
    d, total = 64, cu[-1]
    layout = SequenceLayout.make("auto", total, ranks, cu_seqlens=cu, windows=[window])
    for rank in range(ranks):  # plain integers: made before anything is fake, and kept
        Schedule.of(layout, rank, window=window)
        layout.positions(rank)
    chosen, _ = select_kernel(CUDA, torch.bfloat16, d, name)
    with fake if HAS_CUDA else contextlib.nullcontext():
        q, k, v, dout = (
            torch.empty(layout.padded_total, 1, n, d, dtype=torch.bfloat16, device=KERNELS_ON)
            for n in (heads[0], heads[1], heads[1], heads[0])
        )
        for number in range(ranks):
            rank = Rank(layout, number, (q, k, v, dout), window)
            for step, _, k_rows, v_rows in rank.steps:
                for call in calls_of(step, chosen, KERNELS_ON):
                    out, lse = call.forward(chosen, rank.q, k_rows, v_rows, 0.125)
                    alike("out", out, rank.q[call.q])
                    rows = torch.empty(1, heads[0], out.shape[0], dtype=torch.float32, device=KERNELS_ON)
                    alike("lse", lse, rows)
            out, lse = rank.forward(chosen, 0.125)
            dq, home = rank.backward(chosen, 0.125, out, lse)
            alike("dq", dq, rank.q, torch.float32)
            for _, dk, dv in home:
                alike("dk", dk, dv)


def model(
    fake: FakeTensorMode,
    device: torch.device,
    tp: int,
    cp: int,
    comm: str,
    sequence_parallel: bool,
    recompute: str,
    **more,
) -> None:
    """Forward and backward of a small Llama in bfloat16, cut over tp x cp; ``more`` are fields of a hybrid model."""
    length = 1024
    with world(tp * cp):
        mesh = ParallelMesh.build(MeshSizes(tp=tp, cp=cp), device.type)
        config = TransformerConfig(
            num_layers=2,
            hidden_size=256,
            num_attention_heads=8,
            num_query_groups=4,
            ffn_hidden_size=512,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func="silu",
            add_bias_linear=False,
            qk_layernorm=True,
            tensor_model_parallel_size=tp,
            context_parallel_size=cp,
            sequence_parallel=sequence_parallel,
            cp_comm_type=comm,
            params_dtype=torch.bfloat16,
            perform_initialization=False,
            **more,
        )
        make = SequenceLayout.contiguous if config.recurrent else SequenceLayout.zigzag
        layout = make(length, cp, cu_seqlens=[0, 100, 101, 700, length])
        rows = len(layout.positions(0))
        with fake, device:
            gpt = GPTModel(config, 1000, length, pg_collection=mesh.groups)
            for layer in gpt.decoder.layers.values():
                layer.recompute = recompute
            tokens = torch.zeros(1, rows, dtype=torch.int64)
            loss = gpt(tokens, labels=tokens, layout=layout)
            alike("loss", loss, torch.empty(1, rows, dtype=torch.float32))
            loss.sum().backward()
            for name, parameter in gpt.named_parameters():
                if parameter.grad is None:
                    raise AssertionError(f"{name} has no gradient")
                alike(name, parameter.grad.to_local(), parameter.to_local())


def checks(
    fake: FakeTensorMode, device: torch.device, tp: int, cp: int
) -> Iterator[tuple[str, Callable[[], None]]]:
    pack = [0, 700, 701, 1500, 2048]
    shapes: dict[str, tuple[list[int], int | None, int]] = {
        "one sequence": ([0, 2048], None, 1),
        "packed": (pack, None, 1),
        "packed, 4 ranks": (pack, None, 4),
        "window, packed, 4 ranks": (pack, 300, 4),
    }
    for name in ("math", "cuda-flash", "cudnn"):
        for what, (cu, window, ranks) in shapes.items():
            yield f"{name}: {what}", partial(kernel, fake, name, cu, window, ranks, (8, 2))
    for comm in ("p2p", "all_gather", "a2a"):
        for cut in (False, True):
            name = f"model, tp {tp} x cp {cp}, {comm}{', sequence parallel' if cut else ''}"
            yield name, partial(model, fake, device, tp, cp, comm, cut, "none")
    for kind, fields in RECURRENT.items():
        for way in ("state", "a2a"):
            more = {"layer_types": [kind, "attention"], "ssm_cp_type": way, **fields}
            name = f"model, tp {tp} x cp {cp}, {kind} and attention, {way}"
            yield name, partial(model, fake, device, tp, cp, "p2p", True, "none", **more)
    for recompute in ("full", "selective"):
        name = f"model, tp {tp} x cp {cp}, recompute {recompute}"
        yield name, partial(model, fake, device, tp, cp, "p2p", True, recompute)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--cp", type=int, default=2)
    args = parser.parse_args()
    print(f"torch {torch.__version__}; kernels on {KERNELS_ON.type}, models on {MODELS_ON.type}")
    wrong = 0
    # one mode for all: what is kept by size (boundaries of packs) is met again
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with pretend():
        for name, check in checks(fake, MODELS_ON, args.tp, args.cp):
            try:
                check()
                print(f"ok     {name}", flush=True)
            except Exception as error:
                wrong += 1
                traceback.print_exception(error)
                first = (str(error).strip() or repr(error)).splitlines()[0]
                print(f"WRONG  {name}: {first}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
