"""The first steps at the config's layout and on one process, side by side.

Both runs start from the same config, weights and data, in float64. The layout's run uses the
config's kernels; the reference is one process with the plain ``math`` kernel, so what is
compared shares neither the cutting nor the kernel. Compared are the losses of all steps, the
gradient norms, the evaluation, and every whole gradient of the first step.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from longspan.config.load import to_yaml
from longspan.config.run import Run
from longspan.config.sizes import MeshSizes
from longspan.errors import UserError
from longspan.runs.prepare import check_weights
from longspan.runs.start import WORKER, Launch, ProcessesFailed, joined, start

if TYPE_CHECKING:
    from longspan.mesh.mesh import ParallelMesh

#: relative, against the one-process reference
TOLERANCES = {"float64": 1e-10, "float32": 1e-4}
EVALUATION_SAMPLES = 4
#: steps looked at beyond the run's own for one in which a token counts
MORE_STEPS = 100


def variants(run: Run, everything: bool) -> list[Run]:
    """The runs to compare: the config's own, or one for each communication type and layout that fits.

    Raises:
        UserError: everything is asked for where context parallelism is off.
    """
    if not everything:
        return [run]
    from longspan.config.model import CP_COMM_TYPES, hierarchy_proposal
    from longspan.context_parallel.layout import LAYOUTS

    whole = {"hybrid_context_parallel": False, "max_seqlen_per_dp_cp_rank": None}
    run, cp = run.with_keys(**whole), run.sizes.cp
    if cp == 1:
        raise UserError(
            "--all varies how the sequence is cut, but context_parallel_size is 1. Raise it (--context-parallel-size 2), or "
            "leave --all out."
        )
    heads = run.model.num_attention_heads // run.sizes.tp
    sizes = run.sizes.hierarchical_cp or hierarchy_proposal(cp, heads)
    runs = []
    for kind in CP_COMM_TYPES:
        if heads % {"a2a": cp, "a2a+p2p": sizes[0]}.get(kind, 1):
            continue
        for layout in LAYOUTS:
            hierarchy = list(sizes) if kind == "a2a+p2p" else None
            runs.append(
                run.with_keys(
                    cp_comm_type=kind, cp_layout=layout, hierarchical_context_parallel_sizes=hierarchy
                )
            )
    return runs


def one_process(run: Run) -> Run:
    """The same run on one process: the same global batch, plain attention, everything kept for backward."""
    return run.with_keys(
        tensor_parallel_size=1,
        context_parallel_size=1,
        pipeline_parallel_size=1,
        dp_shard_size=1,
        dp_replicate_size=1,
        sequence_parallel=None,
        gradient_accumulation_steps=run.batch.global_size // run.batch.micro,
        attention_backend="math",
        cp_comm_type="p2p",
        hierarchical_context_parallel_sizes=None,
        hybrid_context_parallel=False,
        max_seqlen_per_dp_cp_rank=None,
        # the keys that save memory are held against doing without them
        gradient_checkpointing=False,
        activation_offloading=False,
        offload_params=False,
        tiled_mlp=False,
        tiled_mlp_num_shards=None,
        torch_compile=False,
    )


def measure(run: Run, device, steps: int, mesh: ParallelMesh | None = None) -> dict:
    """Losses, gradient norms, evaluation and whole gradients of the first step (with LoRA of the last one, because the
    gradient of A is zero until B has changed). Collective.

    Steps in which no token counts are passed over, and those behind the run's last one taken where they are needed:
    the data begins again. Without warm-up each step changes the weights.
    """
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    from longspan.training.schedule import learning_rate
    from longspan.training.trainer import Trainer

    few = min(run.config.eval_max_samples or EVALUATION_SAMPLES, EVALUATION_SAMPLES)
    run = run.with_keys(eval_max_samples=few)
    trainer = Trainer(run, device, mesh=mesh)
    first = dist.get_rank() == 0
    result: dict = {"losses": [], "norms": [], "gradients": {}}
    step, last = 0, max(trainer.steps, steps) + MORE_STEPS
    while len(result["losses"]) < steps:
        if step == last:
            raise UserError(
                f"verify: only {len(result['losses'])} of the first {step} steps have a token that counts in the loss, fewer "
                f"than the {steps} to compare. Lower --steps, or look at the data: longspan prepare CONFIG --show 3."
            )
        loss, _ = trainer.compute_gradients(trainer.micro_batches(step))
        step += 1
        if loss is None:
            continue
        if len(result["losses"]) == (steps - 1 if run.lora is not None else 0):
            for name, parameter in trainer.model.named_parameters():
                if not parameter.requires_grad:
                    continue
                assert isinstance(parameter.grad, DTensor)
                whole = parameter.grad.full_tensor().cpu().clone()  # clipping works in place
                if first:
                    result["gradients"][name] = whole
        rate = learning_rate(run.config, step, last, warmup=0)
        result["norms"].append(trainer.apply_gradients(rate))
        result["losses"].append(loss)
    evaluation = trainer.evaluate() if trainer.valid_data is not None else {"loss": None, "tokens": None}
    return result | {"evaluation": evaluation["loss"], "evaluation_tokens": evaluation["tokens"]}


def verify_run(
    run: Run,
    launch: Launch,
    steps: int,
    dtype: str,
    everything: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """Compares the run's layout, or every one that fits its mesh (``everything``), with one process.

    Args:
        say: is given a line at the beginning of each part.

    Returns:
        The result of each comparison, see :func:`errors`.

    Raises:
        UserError: something does not fit, or the processes of the layout failed.
    """
    if dtype not in TOLERANCES:
        raise UserError(f"dtype {dtype!r}: one of {', '.join(TOLERANCES)}.")
    from longspan.data.checks import check_data

    run = run.with_keys(params_dtype=dtype, bf16=False, tf32=False, use_tensorboard=False)
    check_data(run)
    check_weights(run)
    runs = variants(run, everything)
    with tempfile.TemporaryDirectory() as folder:
        path, result = Path(folder) / "config.yaml", Path(folder) / "result.pt"
        path.write_text(to_yaml(run.config), encoding="utf-8")
        times = f", {len(runs)} times" if len(runs) > 1 else ""
        say(f"running {steps} steps at {run.sizes.equation()}{times}")
        worker = ["verify", str(path), "--steps", str(steps), WORKER, str(result)]
        worker += ["--all"] if everything else []
        if code := start(launch, run.sizes.world_size, worker, run.device):
            raise ProcessesFailed(code)
        say("running them on one process")
        return compare(runs, steps, result)


def work(runs: list[Run], steps: int, result: Path) -> int:
    """One rank of the layout's runs; rank 0 writes the results."""
    import torch
    import torch.distributed as dist

    from longspan.mesh.mesh import ParallelMesh

    with joined(runs[0]) as device:
        meshes: dict[
            MeshSizes, ParallelMesh
        ] = {}  # groups take threads, so runs that are cut alike share them
        measured = []
        for run in runs:
            if run.sizes not in meshes:
                meshes[run.sizes] = ParallelMesh.build(run.sizes, run.device)
            measured.append(measure(run, device, steps, meshes[run.sizes]))
        if dist.get_rank() == 0:
            torch.save(measured, result)
    return 0


def relative(a: float, b: float) -> float:
    """The difference over the reference's absolute value."""
    return abs(a - b) / max(abs(b), 1e-300)


def largest(errors: Iterable[float]) -> float:
    """The largest error; a NaN, which is no comparison, counts as larger than all numbers."""
    return max(errors, key=_with_nan_last)


def _with_nan_last(error: float) -> tuple[bool, float]:
    return math.isnan(error), error


def compare(runs: list[Run], steps: int, result: Path) -> list[dict]:
    """Runs the reference in this process and holds the layout's results against it."""
    import torch

    from longspan.mesh.mesh import close_distributed, init_distributed

    init_distributed(runs[0].device)
    expected = measure(one_process(runs[0]), torch.device(runs[0].device), steps)
    close_distributed()
    measured = torch.load(result, weights_only=True)
    return [errors(run, steps, got, expected) for run, got in zip(runs, measured)]


def errors(run: Run, steps: int, got: dict, expected: dict) -> dict:
    """One run's result beside the reference's."""
    losses = list(map(relative, got["losses"], expected["losses"]))
    # without a token that counts, which both must find, there is no loss to compare
    compared = bool(got["evaluation_tokens"] or expected["evaluation_tokens"])
    if compared:
        losses.append(relative(got["evaluation"], expected["evaluation"]))
    # a gradient that is zero but for rounding is measured against the largest of all, not against itself
    wholes = {name: whole.double() for name, whole in expected["gradients"].items()}
    least = 1e-5 * max(whole.abs().max().item() for whole in wholes.values())
    gradients = {
        name: (got["gradients"][name].double() - whole).abs().max().item()
        / max(whole.abs().max().item(), least, 1e-300)
        for name, whole in wholes.items()
    }
    worst = max(gradients, key=lambda name: _with_nan_last(gradients[name]))
    dtype = run.precision.params_dtype
    numbers = {
        "loss_error": largest(losses),
        "grad_norm_error": largest(map(relative, got["norms"], expected["norms"])),
        "max_gradient_error": gradients[worst],
    }
    return {
        "layout": run.sizes.equation(),
        "cp_comm_type": run.config.cp_comm_type,
        "cp_layout": run.config.cp_layout,
        "reference": "one process, math attention",
        "dtype": dtype,
        "tolerance": TOLERANCES[dtype],
        **numbers,
        "worst_parameter": worst,
        "steps": steps,
        "losses": got["losses"],
        "reference_losses": expected["losses"],
        "eval_loss": got["evaluation"] if compared else None,
        "reference_eval_loss": expected["evaluation"] if compared else None,
        "eval_tokens": expected["evaluation_tokens"],
        # a NaN is not within any tolerance
        "passed": all(value <= TOLERANCES[dtype] for value in numbers.values()),
    }
