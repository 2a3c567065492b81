"""Compares the first steps at the config's layout with the same steps on one process.

Both runs start from the same config, weights and data, in float64 or float32. The layout's run uses the
config's kernels; the reference is one process with the plain ``math`` kernel, so the two runs share neither
the layout nor the kernel. The losses and gradient norms of all steps, the evaluation, and every whole
gradient of the first step (with LoRA of the last step) are compared.
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

#: the largest relative errors against the reference on one process
TOLERANCES = {"float64": 1e-10, "float32": 1e-4}
#: the same for a model of transformers' own class, which computes norms, rotations and routes in float32
CLASS_TOLERANCES = {"float64": 1e-5, "float32": 1e-4}
EVALUATION_SAMPLES = 4
#: number of steps after the run's own that are searched for steps in which a token counts
MORE_STEPS = 100


def variants(run: Run, everything: bool) -> list[Run]:
    """The runs to compare: the config's own run, or one for each communication type and layout that fits.

    Raises:
        UserError: ``everything`` without context parallelism.
    """
    if not everything:
        return [run]
    from longspan.config.model import CP_COMM_TYPES, hierarchy_proposal
    from longspan.config.recurrent import recurrent_cut_problems as way_problems
    from longspan.context_parallel.layout import LAYOUTS

    whole: dict = {"hybrid_context_parallel": False, "max_seqlen_per_dp_cp_rank": None}
    if run.model.recurrent:
        whole["cp_layout"] = "contiguous"
    run, cp = run.with_keys(**whole), run.sizes.cp
    if cp == 1:
        raise UserError(
            "--all varies how the sequence is cut, but context_parallel_size is 1. Raise it (--context-parallel-size 2), or "
            "leave --all out."
        )
    heads = run.model.num_attention_heads // run.sizes.tp
    sizes = run.sizes.hierarchical_cp or hierarchy_proposal(cp, heads)
    runs = []
    if run.model.recurrent:
        # The stream stays contiguous; attention's layout, and the way of the states, vary instead.
        ways = [way for way in ("state", "a2a") if not way_problems(run.model, run.sizes.tp, cp, way)]
        keys = {"attention_cp_layout": "contiguous"} if run.attention_layers else {}
        runs = [run.with_keys(ssm_cp_type=way, **keys) for way in ways]
        if not run.attention_layers:
            return runs
    for kind in CP_COMM_TYPES:
        if heads % {"a2a": cp, "a2a+p2p": sizes[0]}.get(kind, 1):
            continue
        for layout in LAYOUTS:
            hierarchy = list(sizes) if kind == "a2a+p2p" else None
            key = "attention_cp_layout" if run.model.recurrent else "cp_layout"
            runs.append(
                run.with_keys(
                    **{"cp_comm_type": kind, key: layout, "hierarchical_context_parallel_sizes": hierarchy}
                )
            )
    return runs


def one_process(run: Run) -> Run:
    """The same run on one process: the same global batch, plain attention, everything kept for backward."""
    balancing = run.config.moe_router_load_balancing_type
    if run.config.hybrid_context_parallel and run.model.num_moe_experts is not None:
        _refuse_uncomparable(run)
        # In a hybrid run a document takes the place of a sequence.
        balancing = "seq_aux_loss" if "aux_loss" in run.model.balancing else balancing
    return run.with_keys(
        moe_router_load_balancing_type=balancing,
        expert_parallel_size=1,
        expert_tensor_parallel_size=None,
        moe_token_dispatcher_type="alltoall",
        tensor_parallel_size=1,
        context_parallel_size=1,
        pipeline_parallel_size=1,
        virtual_pipeline_parallel_size=None,
        pipeline_schedule=None,
        pipeline_layout=None,
        dp_shard_size=1,
        dp_replicate_size=1,
        sequence_parallel=None,
        gradient_accumulation_steps=run.batch.global_size // run.batch.micro,
        attention_backend="math",
        recurrent_backend="torch" if run.model.recurrent else "auto",
        cp_comm_type="p2p",
        ssm_cp_type="auto",
        attention_cp_layout="auto",
        hierarchical_context_parallel_sizes=None,
        hybrid_context_parallel=False,
        max_seqlen_per_dp_cp_rank=None,
        # The keys that save memory are off, so that their results are compared with results without them.
        gradient_checkpointing=False,
        activation_offloading=False,
        offload_params=False,
        tiled_mlp=False,
        tiled_mlp_num_shards=None,
        torch_compile=False,
    )


def _refuse_uncomparable(run: Run) -> None:
    """Experts of a hybrid run whose sets of tokens one process without it does not have."""
    model = run.model
    kinds = [*model.balancing]
    wrong = "global_aux_loss" in kinds or {"aux_loss", "seq_aux_loss"} <= {*kinds}
    if wrong or model.moe_expert_capacity_factor is not None:
        raise UserError(
            "verify: with hybrid_context_parallel experts are balanced, and their capacity counted, over documents, and on one "
            "process over sequences. It compares such a run with aux_loss or seq_aux_loss alone, without a capacity: "
            "--moe-router-load-balancing-type aux_loss."
        )


def measure(run: Run, device, steps: int, mesh: ParallelMesh | None = None) -> dict:
    """Trains ``steps`` steps, and measures what is compared. Collective.

    Steps in which no token counts are skipped. If needed, steps after the run's last one are used, for which
    the data begins again. There is no warm-up, so that each step changes the weights.

    Returns:
        losses and norms (one number for each step); evaluation and evaluation_tokens; gradients (parameter's
        name -> whole gradient, on the first rank only). The gradients are those of the first step; with LoRA
        those of the last step, because the gradient of A is zero until B has changed.

    Raises:
        UserError: too few steps have a token that counts.
    """
    import torch.distributed as dist

    from longspan.mesh.whole import whole_tensors
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
            gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
            for name, whole in whole_tensors(gradients, trainer.groups.pp):
                if first:
                    # Clipping changes the gradient in place, so a copy is kept.
                    result["gradients"][name] = whole.clone()
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
        say: called with a line of text at the beginning of each part.

    Returns:
        The result of each comparison, see :func:`errors`.

    Raises:
        UserError: something does not fit.
        ProcessesFailed: the processes of the layout failed.
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
    """Measures the layout's runs on one rank; rank 0 writes the results. Returns the exit code."""
    import torch
    import torch.distributed as dist

    from longspan.mesh.mesh import ParallelMesh

    with joined(runs[0]) as device:
        # Process groups take threads, so runs of the same sizes share one mesh.
        meshes: dict[MeshSizes, ParallelMesh] = {}
        measured = []
        for run in runs:
            if run.sizes not in meshes:
                meshes[run.sizes] = ParallelMesh.build(run.sizes, run.device)
            measured.append(measure(run, device, steps, meshes[run.sizes]))
        if dist.get_rank() == 0:
            torch.save(measured, result)
    return 0


def relative(a: float, b: float) -> float:
    """The absolute difference of a and the reference b, divided by the absolute value of b."""
    return abs(a - b) / max(abs(b), 1e-300)


def largest(errors: Iterable[float]) -> float:
    """The largest error; NaN counts as larger than all numbers, because it means that a comparison failed."""
    return max(errors, key=_with_nan_last)


def _with_nan_last(error: float) -> tuple[bool, float]:
    return math.isnan(error), error


def compare(runs: list[Run], steps: int, result: Path) -> list[dict]:
    """Runs the reference in this process and compares the layout's results with it, see :func:`errors`."""
    import torch

    from longspan.mesh.mesh import close_distributed, init_distributed

    init_distributed(runs[0].device)
    expected = measure(one_process(runs[0]), torch.device(runs[0].device), steps)
    close_distributed()
    measured = torch.load(result, weights_only=True)
    return [errors(run, steps, got, expected) for run, got in zip(runs, measured)]


def errors(run: Run, steps: int, got: dict, expected: dict) -> dict:
    """Compares one run with the reference.

    Args:
        got, expected: the results of :func:`measure` for the run and for the reference.

    Returns:
        A dict of the compared runs, the largest errors (relative), the tolerance, the losses, and passed.
    """
    losses = list(map(relative, got["losses"], expected["losses"]))
    # If both evaluations have no token that counts, there is no loss to compare.
    compared = bool(got["evaluation_tokens"] or expected["evaluation_tokens"])
    if compared:
        losses.append(relative(got["evaluation"], expected["evaluation"]))
    # A gradient that is zero except for rounding is measured by the largest gradient, not by itself.
    wholes = {name: whole.double() for name, whole in expected["gradients"].items()}
    least = 1e-5 * max(whole.abs().max().item() for whole in wholes.values())
    gradients = {
        name: (got["gradients"][name].double() - whole).abs().max().item()
        / max(whole.abs().max().item(), least, 1e-300)
        for name, whole in wholes.items()
    }
    worst = max(gradients, key=lambda name: _with_nan_last(gradients[name]))
    dtype = run.precision.params_dtype
    tolerance = (CLASS_TOLERANCES if run.by_class else TOLERANCES)[dtype]
    numbers = {
        "loss_error": largest(losses),
        "grad_norm_error": largest(map(relative, got["norms"], expected["norms"])),
        "max_gradient_error": gradients[worst],
    }
    return {
        "layout": run.sizes.equation(),
        "cp_comm_type": run.config.cp_comm_type,
        "cp_layout": run.config.cp_layout,
        **(
            {"ssm_cp_type": run.config.ssm_cp_type, "attention_cp_layout": run.config.attention_cp_layout}
            if run.model.recurrent
            else {}
        ),
        "reference": "one process, math attention",
        "dtype": dtype,
        "tolerance": tolerance,
        **numbers,
        "worst_parameter": worst,
        "steps": steps,
        "losses": got["losses"],
        "reference_losses": expected["losses"],
        "eval_loss": got["evaluation"] if compared else None,
        "reference_eval_loss": expected["evaluation"] if compared else None,
        "eval_tokens": expected["evaluation_tokens"],
        # The comparison is false for NaN, so a NaN does not pass.
        "passed": all(value <= tolerance for value in numbers.values()),
    }
