"""Kernels of packages behind their protocols, by stand-ins of the packages, against plain PyTorch; and the choice."""

import importlib.machinery
import subprocess
import sys
import types

import pytest
import torch

import fake_packages
import hybrids
import pool
import scans
from longspan.config.load import make_config
from longspan.config.sizes import MeshSizes
from longspan.context_parallel import SequenceLayout
from longspan.context_parallel.runs_of_tokens import marks_of_rank
from longspan.context_parallel.state import Decays, HandOn, StatesOfRanks, Transitions
from longspan.errors import UserError
from longspan.recurrent.kernels.choose import kernels_line, select_kernel, select_kernels
from longspan.recurrent.kernels.packages import CausalConv1d, Fla, MambaSsm
from longspan.recurrent.kernels.plain import PlainConvolution, PlainDelta, PlainStateSpace
from longspan.runs.check import checked
from longspan.runs.start import Launch

#: documents of one token, one that begins at a border of two ranks, and padding at the end
PACKED, WHOLE = (0, 1, 9, 10, 16, 31), (0, 31)
F32, F64 = torch.float32, torch.float64
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

STATE_SPACE = {"package": MambaSsm(fake_packages.mamba_chunk_scan_combined), "plain": PlainStateSpace()}
DELTA = {"package": Fla(fake_packages.chunk_gated_delta_rule), "plain": PlainDelta()}
CONVOLUTION = {"package": CausalConv1d(fake_packages.causal_conv1d_fn), "plain": PlainConvolution()}


def largest_difference(found, expected):
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item() for a, b in zip(found, expected))


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-11), (F32, 2e-5)])
@pytest.mark.parametrize("cu", [PACKED, WHOLE])
@pytest.mark.parametrize("b", [1, 2])
def test_all_tokens_here(cu, b, dtype, tolerance):
    marks = scans.marks(cu, b, CPU, multiple=4)
    assert marks.real is not None
    for kind, kernels in (("mamba", STATE_SPACE), ("gated_delta", DELTA)):
        inputs = scans.INPUTS[kind](len(marks.real), b, dtype)
        found, expected = (
            scans.with_gradients(
                lambda x, kind=kind, kernel=kernel: scans.scan(kind, kernel, x, marks), inputs
            )
            for kernel in kernels.values()
        )
        assert largest_difference(found, expected) < tolerance, kind


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["mamba", "gated_delta"])
def test_dtypes_and_precision_of_half_the_width(kind, dtype):
    kernels = STATE_SPACE if kind == "mamba" else DELTA
    inputs = scans.INPUTS[kind](PACKED[-1], 2, dtype)
    for kernel in kernels.values():
        assert max(scans.errors(kind, kernel, inputs, PACKED, CPU, kernels["plain"])) < 5e-3


@pytest.mark.parametrize("cu", [PACKED, WHOLE])
@pytest.mark.parametrize("with_tail", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_convolution(cu, with_tail, bias):
    marks = scans.marks(cu, 2, CPU)
    inputs = scans.draw(
        F64, (cu[-1], 2, 8), (8, 4), *([(8,)] if bias else []), *([(3, 2, 8)] if with_tail else [])
    )

    def run(kernel, x, weight, *others):
        tail = others[-1] if with_tail else None
        return kernel(x, weight, others[0] if bias else None, marks.starts, tail)

    found, expected = (
        scans.with_gradients(lambda x, kernel=kernel: run(kernel, *x), inputs)
        for kernel in CONVOLUTION.values()
    )
    assert largest_difference(found, expected) < 1e-11


def cut(cu, kind, dtype, package):
    """Every rank's outputs and gradients, with states that travel: those of A and D are a rank's part."""
    import torch.distributed as dist

    rank, ranks, b = dist.get_rank(), dist.get_world_size(), 2
    group = dist.group.WORLD
    layout = SequenceLayout.contiguous(cu[-1], ranks, cu_seqlens=cu)
    marks = marks_of_rank(layout, rank, CPU, b)

    inputs = scans.INPUTS[kind](cu[-1], b, dtype)
    inputs = [x if x.dim() == 1 else layout.shard(x, rank, dim=0) for x in inputs]

    def scanned(x):
        kernel = STATE_SPACE[package]
        span = kernel.first_half(*x, marks.starts, marks.real)
        shape = span.state.shape
        states = StatesOfRanks.of(group, layout, Decays(), shape, shape[:2], dtype, CPU)
        return kernel.second_half(span, HandOn.apply(span.state, span.decay, states))

    def ruled(x):
        q, k, v, g, beta = x
        if marks.real is not None:
            padding = ~marks.real.unsqueeze(-1)
            g, beta = g.masked_fill(padding, 0), beta.masked_fill(padding, 0)
        states = StatesOfRanks.of(group, layout, Transitions(), (b, 4, 5, 3), (b, 4, 5, 5), dtype, CPU)
        return DELTA[package](q, k, v, g, beta, marks.starts, marks.documents, states)

    y, *grads = scans.with_gradients(scanned if kind == "mamba" else ruled, inputs)
    real = torch.ones(len(y), dtype=torch.bool) if marks.real is None else marks.real[:, 0]
    return [y[real], *(x if x.dim() == 1 else x[real] for x in grads)]


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["mamba", "gated_delta"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_states_travel_between_halves(kind, ranks):
    for cu in (PACKED, WHOLE):
        for dtype, tolerance in ((F64, 1e-11), (F32, 5e-5)):
            found, expected = (
                pool.run(ranks, cut, cu, kind, dtype, package) for package in ("package", "plain")
            )
            for one, other in zip(found, expected):
                assert largest_difference(one, other) < tolerance, (cu, dtype)


def with_packages(sizes, packs, options):
    """``hybrids.gradients`` with the kernels of packages in every mixer."""

    def replaced(model):
        for layer in model.decoder.layers.values():
            for mixer in layer.children():
                if getattr(mixer, "kind", None) is not None:
                    kernels = STATE_SPACE if mixer.kind == "mamba" else DELTA
                    mixer.scan_kernel = kernels["package"]
                    mixer.convolution_kernel = CONVOLUTION["package"]

    return hybrids.gradients(sizes, packs, options, adapt=replaced)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (MeshSizes(), {}),
        (MeshSizes(cp=2), {"ssm_cp_type": "state"}),
        (MeshSizes(cp=3), {"ssm_cp_type": "state", "recompute": "full"}),
        (MeshSizes(cp=2), {"ssm_cp_type": "a2a", "recompute": "selective"}),
    ],
    ids=str,
)
def test_a_model_with_packages_is_the_model(sizes, options):
    packs = [(0, 1, 9, 17, 18, 30), (0, 30)]
    options = options | {
        "mamba_num_heads": 12,
        "mamba_num_groups": 6,
        "linear_num_key_heads": 6,
        "linear_num_value_heads": 12,
    }
    alone = {k: v for k, v in options.items() if k not in ("recompute", "ssm_cp_type")}
    found = pool.run(sizes.world_size, with_packages, sizes, packs, options)[0]
    expected = pool.run(1, hybrids.gradients, MeshSizes(), packs, alone)[0]
    for pack, one, other in zip(packs, found, expected):
        worst, name = hybrids.difference(one, other)
        assert worst < 1e-10, (pack, name)


# --- the choice -------------------------------------------------------------------------------

PLACES = {
    "mamba_ssm.ops.triton.ssd_combined": "mamba_chunk_scan_combined",
    "fla.ops.gated_delta_rule": "chunk_gated_delta_rule",
    "causal_conv1d": "causal_conv1d_fn",
}
PARTS = {"mamba": (64, 128), "gated_delta": (128, 128), "convolution": (4096, 4)}
NAMES = {"mamba": "mamba-ssm", "gated_delta": "fla", "convolution": "causal-conv1d"}


@pytest.fixture
def installed(monkeypatch):
    """The packages' modules, with the stand-ins' functions."""
    for place, function in PLACES.items():
        names = place.split(".")
        for end in range(1, len(names) + 1):
            name = ".".join(names[:end])
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="stand-in")
            monkeypatch.setitem(sys.modules, name, module)
        setattr(module, function, getattr(fake_packages, function))


@pytest.mark.parametrize("part", PARTS)
def test_auto_takes_an_installed_package_on_cuda(part, installed):
    for dtype in (torch.bfloat16, torch.float16):
        kernel, reason = select_kernel(part, CUDA, dtype, PARTS[part])
        assert kernel.name == NAMES[part]
        assert kernel.function is getattr(fake_packages, kernel.function.__name__)
        assert reason == "it is installed"
    assert select_kernel(part, CPU, torch.bfloat16, PARTS[part]).kernel.name == "torch"
    assert select_kernel(part, CUDA, F64, PARTS[part]).kernel.name == "torch"
    assert (select_kernel(part, CUDA, F32, PARTS[part]).kernel.name == "torch") is (part != "convolution")
    assert select_kernel(part, CUDA, torch.bfloat16, PARTS[part], "torch") == (
        select_kernel(part, CPU, F32, PARTS[part]).kernel,
        "asked for",
    )
    kernel, reason = select_kernel(part, CUDA, torch.bfloat16, PARTS[part], deterministic=True)
    assert (kernel.name, reason) == ("torch", f"{NAMES[part]} is not deterministic")


@pytest.mark.parametrize(
    ("part", "sizes", "words"),
    [
        ("mamba", (12, 128), "divide by 8, and states up to 256, not 12 and 128"),
        ("mamba", (64, 512), "states up to 256, not 64 and 512"),
        ("gated_delta", (512, 128), "key head sizes up to 256, not 512"),
        ("convolution", (100, 4), "channels that divide by 8 and kernels of 2 to 4, not 100 and 4"),
        ("convolution", (64, 1), "kernels of 2 to 4, not 64 and 1"),
    ],
)
def test_sizes_that_a_package_does_not_take(part, sizes, words, installed):
    kernel, reason = select_kernel(part, CUDA, torch.bfloat16, sizes)
    assert kernel.name == "torch"
    assert words in reason
    if part != "convolution":
        with pytest.raises(UserError, match=f"recurrent_backend '{NAMES[part]}' takes .*Use auto"):
            select_kernel(part, CUDA, torch.bfloat16, sizes, NAMES[part])


def test_a_package_that_cannot_be_imported_is_a_reason(installed, monkeypatch):
    monkeypatch.delattr(sys.modules["fla.ops.gated_delta_rule"], "chunk_gated_delta_rule")
    kernel, reason = select_kernel("gated_delta", CUDA, torch.bfloat16, (128, 128))
    assert kernel.name == "torch"
    assert reason.startswith("fla cannot be imported (module 'fla.ops.gated_delta_rule' has no attribute")


def test_a_package_is_named_for_its_mixer_alone(installed):
    assert select_kernel("gated_delta", CUDA, torch.bfloat16, (128, 128), "mamba-ssm").kernel.name == "fla"
    assert select_kernel("mamba", CUDA, torch.bfloat16, (64, 128), "mamba-ssm").reason == "asked for"


@pytest.mark.parametrize("part", ["mamba", "gated_delta"])
def test_a_package_that_is_named_and_cannot_serve_is_refused(part):
    with pytest.raises(
        UserError, match=f"recurrent_backend '{NAMES[part]}' runs on cuda, not on cpu. Use auto"
    ):
        select_kernel(part, CPU, torch.bfloat16, PARTS[part], NAMES[part])


@pytest.mark.parametrize(
    ("types", "backend", "words"),
    [
        (["attention"], "torch", "recurrent_backend torch has no effect without recurrent layers"),
        (
            ["gated_delta"],
            "mamba-ssm",
            "recurrent_backend mamba-ssm has no effect without layers of type mamba",
        ),
        (["mamba"], "fla", "recurrent_backend fla has no effect without layers of type gated_delta"),
        (
            ["mamba"],
            "mamba_ssm",
            "recurrent_backend 'mamba_ssm': one of auto, torch, mamba-ssm, fla. .*mamba-ssm",
        ),
    ],
)
def test_a_backend_that_a_model_cannot_have_is_refused(types, backend, words):
    with pytest.raises(ValueError, match=words):
        hybrids.config_of(MeshSizes(), layer_types=types, recurrent_backend=backend)


@pytest.mark.parametrize(
    ("types", "backend", "words"),
    [
        (["mamba", "gated_delta"], "fla", "recurrent_backend 'fla' runs on cuda, not on cpu. Use auto."),
        (
            ["attention", "mamba"],
            "fla",
            "recurrent_backend fla has no effect without layers of type gated_delta",
        ),
    ],
)
def test_a_run_is_refused_before_its_first_step(types, backend, words):
    sizes = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "vocab_size": 64,
        "sequence_len": 32,
    }
    keys = {
        "mock_data": True,
        "max_steps": 1,
        "learning_rate": 0.001,
        "device": "cpu",
        "layer_types": types,
        "export_hf": False,
    }
    reading = make_config(sizes | keys | {"mamba_num_groups": 2, "recurrent_backend": backend})
    with pytest.raises(UserError, match=words):
        checked(reading, Launch(processes=1))


def test_the_line_of_the_banner(installed, monkeypatch):
    config = hybrids.config_of(MeshSizes(), mamba_state_dim=8, mamba_head_dim=8)
    choices = select_kernels(config, CPU, F32, "auto", False, 1)
    assert set(choices) == {"mamba", "convolution of mamba", "gated_delta", "convolution of gated_delta"}
    line = kernels_line(choices, CPU, "float32")
    assert line == "torch on cpu, float32 (packages with kernels run on cuda)"
    monkeypatch.delitem(sys.modules, "fla")
    choices = select_kernels(config, CUDA, torch.bfloat16, "auto", False, 1)
    on = "on cuda, bfloat16"
    assert kernels_line(choices, CUDA, "bfloat16") == (
        f"mamba: mamba-ssm {on} (it is installed); convolution of mamba, convolution of gated_delta: "
        f"causal-conv1d {on} (it is installed); gated_delta: torch {on} (fla is not installed (pip install "
        "flash-linear-attention))"
    )


def test_importing_longspan_imports_no_package():
    code = "import sys, longspan.models.mixers; print([m for m in ('mamba_ssm', 'fla', 'causal_conv1d') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
