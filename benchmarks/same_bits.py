"""Do two states of this repository compute the same, to the last bit?

    python benchmarks/same_bits.py OLD NEW [--keep FOLDER]

OLD and NEW are commits or folders of checkouts. Twelve small trainings run with each, on the CPU, and what they leave
is compared: losses, gradient norms and evaluations as they are recorded, every tensor of the checkpoints, every byte
of the export. Then NEW goes on from OLD's checkpoints, which must give what OLD's own run recorded. A refactoring
owes a run of this without a difference. Exit code 1: something differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = 4

MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "vocab_size": 97,
    "init_method_std": 0.1,
    "sequence_len": 50,
    "val_set_size": 0.2,
    "global_batch_size": 4,
    "max_steps": STEPS,
    "eval_steps": 2,
    "save_steps": 2,
    "learning_rate": 1e-2,
    "params_dtype": "float32",
    "bf16": False,
    "device": "cpu",
    "use_tensorboard": False,
    "async_save": False,
}
#: name -> what differs from MODEL
CONFIGS: dict[str, dict] = {
    "dense": {"sample_packing": False},
    "packed": {"context_parallel_size": 2},
    "tp2 x cp2": {"tensor_parallel_size": 2, "context_parallel_size": 2, "cp_comm_type": ["p2p", "a2a"]},
    "cp3": {"context_parallel_size": 3, "cp_comm_type": "all_gather", "params_dtype": "float64"},
    "hybrid": {
        "hybrid_context_parallel": True,
        "context_parallel_size": 2,
        "dp_shard_size": 2,
        "max_seqlen_per_dp_cp_rank": 50,
    },
    "LoRA": {"adapter": "lora", "lora_r": 4, "lora_target_linear": True, "context_parallel_size": 2},
    "bf16": {"bf16": True, "context_parallel_size": 2, "dp_replicate_size": 2},
    "recompute full": {"gradient_checkpointing": True, "sliding_window": [7, None]},
    "recompute selective": {"gradient_checkpointing": "selective", "qk_layernorm": True},
    "recompute offload": {
        "gradient_checkpointing": "offload",
        "tiled_mlp": True,
        "tie_word_embeddings": True,
    },
    "learned positions": {
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "gated_linear_unit": False,
        "activation_func": "gelu",
        "add_bias_linear": True,
        "num_query_groups": 4,
        "tensor_parallel_size": 2,
    },
}
#: the twelfth: Megatron-LM's flags
FLAGS = """
--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 48 --max-position-embeddings 48 --vocab-size 97
--micro-batch-size 1 --global-batch-size 4 --train-iters 4 --lr 1e-2 --eval-interval 2 --eval-iters 1 --save-interval 2
--split 80,20,0 --context-parallel-size 2 --swiglu --normalization RMSNorm --disable-bias-linear
--position-embedding-type rope --init-method-std 0.1
"""


def write_data(folder: Path) -> Path:
    """Documents of uneven length in which each token follows from the one before."""
    import numpy as np

    from longspan.data import IndexedDatasetWriter

    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "data", np.uint16) as writer:
        for _ in range(60):
            tokens = [int(rng.integers(97))]
            for _ in range(int(rng.choice([1, 2, 5, 20, 33, 60, 90])) - 1):
                tokens.append((tokens[-1] * 3 + int(rng.integers(2))) % 97)
            writer.add_document(np.array(tokens))
    return folder / "data"


def rank_of_run(arguments: list[str], rank: int, world: int, port: int, log: Path) -> int:
    """What one forked process does: a rank, as torchrun starts it."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    try:
        import torch

        from longspan.cli.main import main

        torch.set_num_threads(1)
        return main(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def train(arguments: list[str], world: int, log: Path) -> None:
    """Runs ``longspan ARGUMENTS`` on so many forked processes; RuntimeError where one fails."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    ranks = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            os._exit(rank_of_run(arguments, rank, world, port, log))
        ranks.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    if any(codes):
        raise RuntimeError(f"longspan {' '.join(arguments)} ended with {codes}:\n{log.read_text()[-4000:]}")


def world_of(changes: dict) -> int:
    world = 1
    for name in ("tensor_parallel_size", "context_parallel_size", "dp_shard_size", "dp_replicate_size"):
        world *= changes.get(name, 1)
    return world


def run_all(folder: Path, data: Path, base: Path | None, resume_from: Path | None) -> None:
    """All trainings with the longspan of this process, each into a folder of its own.

    Args:
        base: a model folder for LoRA; None takes the one that "dense" has just written.
        resume_from: where the checkpoints of step 2 lie from which the runs go on; None starts them anew.
    """
    import yaml

    import longspan.training.checkpoint  # noqa: F401  (the ranks are forked with it)

    for name, changes in CONFIGS.items():
        output = folder / name.replace(" ", "_")
        values = MODEL | changes | {"datasets": [{"path": str(data)}], "output_dir": str(output)}
        if "adapter" in changes:
            values = {k: v for k, v in values.items() if k not in MODEL or k in changes or k[:3] != "num"}
            for key in ("hidden_size", "ffn_hidden_size", "vocab_size", "init_method_std"):
                values.pop(key)
            values["base_model"] = str(base or folder / "dense" / "hf")
        if resume_from is not None:
            values["resume"] = str(resume_from / output.name / "checkpoints" / "step_00000002")
        config = folder / f"{output.name}.yaml"
        config.write_text(yaml.safe_dump(values))
        train(["train", str(config)], world_of(changes), folder / f"{output.name}.log")
        print(f"  {name}", flush=True)
    output = folder / "megatron"
    flags = [
        *FLAGS.split(),
        "--data-path",
        str(data),
        "--device",
        "cpu",
    ]
    flags += ["--output-dir", str(output), "--use-tensorboard", "false"]
    if resume_from is not None:
        flags += ["--load", str(resume_from / "megatron" / "checkpoints" / "step_00000002")]
    train(["pretrain", *flags], 2, folder / "megatron.log")
    print("  Megatron's flags", flush=True)


def tensors_of(checkpoint: Path) -> dict[str, str]:
    """Name -> digest of every tensor of a checkpoint, whatever files they lie in.

    States of the default generator are left out: torch seeds it anew in each process, and a run draws nothing from it.
    """
    import torch
    import torch.distributed.checkpoint as dcp

    metadata = dcp.FileSystemReader(checkpoint).read_metadata()
    state = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in metadata.state_dict_metadata.items()
        if hasattr(about, "properties") and not name.startswith("rng.")
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    digests = {}
    for name, tensor in state.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        digests[name] = hashlib.blake2b(raw, digest_size=8).hexdigest() + str(tuple(tensor.shape))
    return digests


def plain_names(tensors: dict[str, str]) -> dict[str, str]:
    """The names without the prefix by which an optimizer's state was kept in an earlier form."""
    return {name.replace("optimizer.state.", "optimizer."): digest for name, digest in tensors.items()}


#: what is measured in time or memory, and so differs from run to run
MEASURED = ("step_time", "tokens_per_second", "peak_memory_gib", "train_time", "time")


def records(output: Path, after: int = 0) -> list[dict]:
    """What was recorded of the steps behind ``after``, without what is measured."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines if line["step"] > after]


def differences(old: Path, new: Path) -> list[str]:
    """What differs between two folders of a run."""
    found = [f"record: {a}\n          {b}" for a, b in zip(records(old), records(new)) if a != b]
    if len(records(old)) != len(records(new)):
        found.append(f"{len(records(old))} records and {len(records(new))}")
    for step in ("step_00000002", f"step_{STEPS:08d}"):
        a, b = (plain_names(tensors_of(folder / "checkpoints" / step)) for folder in (old, new))
        found += [f"{step}: {n}: {a.get(n)} and {b.get(n)}" for n in sorted(a | b) if a.get(n) != b.get(n)]
    files = {f.relative_to(old) for f in (old / "hf").rglob("*") if f.is_file()}
    files |= {f.relative_to(new) for f in (new / "hf").rglob("*") if f.is_file()}
    for name in sorted(files):
        both = [folder / name for folder in (old, new)]
        if not all(f.is_file() for f in both) or both[0].read_bytes() != both[1].read_bytes():
            found.append(f"export: {name} differs")
    return found


@contextlib.contextmanager
def checkout(which: str) -> Iterator[Path]:
    """The folder of a checkout; of a commit one that is made for the time being."""
    if Path(which).is_dir():
        yield Path(which).resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkout"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", path, which], check=True)
        try:
            yield path
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", path], check=True)


def with_longspan_of(path: Path, *arguments: object) -> None:
    """Runs ``run_all`` in a process that imports the longspan of a checkout."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(path / "src"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    subprocess.run([sys.executable, __file__, "--worker", *map(str, arguments)], env=environment, check=True)


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        folder, data, base, resume_from = (None if a == "None" else Path(a) for a in sys.argv[2:6])
        assert folder is not None
        assert data is not None
        run_all(folder, data, base, resume_from)
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--keep", help="a folder for what the runs leave; without it that goes")
    args = parser.parse_args()
    with contextlib.ExitStack() as until_the_end:
        keep = args.keep or until_the_end.enter_context(tempfile.TemporaryDirectory())
        old, new = (until_the_end.enter_context(checkout(which)) for which in (args.old, args.new))
        folders = {name: Path(keep, name).resolve() for name in ("old", "new", "resumed")}
        for folder in folders.values():
            folder.mkdir(parents=True)
        data = write_data(Path(keep).resolve())
        print(f"trained with {args.old}")
        with_longspan_of(old, folders["old"], data, None, None)
        base = folders["old"] / "dense" / "hf"
        print(f"trained with {args.new}")
        with_longspan_of(new, folders["new"], data, base, None)
        print(f"gone on with {args.new} from checkpoints of {args.old}")
        with_longspan_of(new, folders["resumed"], data, base, folders["old"])
        found: dict[str, list[str]] = {}
        for output in sorted(path for path in folders["old"].iterdir() if path.is_dir()):
            wrong = differences(output, folders["new"] / output.name)
            expected, got = records(output, 2), records(folders["resumed"] / output.name, 2)
            wrong += [f"resumed: {a}\n           {b}" for a, b in zip(expected, got) if a != b]
            wrong += ["resumed: records are missing"] * (len(expected) != len(got))
            found[output.name] = wrong
            print(f"{output.name:<22} {'differs' if wrong else 'the same bits'}")
            for line in wrong[:8]:
                print(f"    {line}")
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
