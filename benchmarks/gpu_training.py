"""Parts of gpu_check.py about training: one step against the CPU's, and speed and memory of a 1B-class model."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import common
import torch
from common import Rows
from torch import Tensor

from longspan import TransformerConfig
from longspan.compiled import compile_parts
from longspan.config.packages import has_package
from longspan.config.sizes import MeshSizes
from longspan.context_parallel import SequenceLayout
from longspan.mesh.mesh import ParallelMesh, init_distributed
from longspan.models import GPTModel
from longspan.models.memory.offload import Offload
from longspan.parallelize import parallelize
from longspan.training.optimizer import clip_gradients, gradient_norm


@dataclass(frozen=True)
class Sizes:
    """A Llama: its sizes, the lengths it is run at, and how often a step is timed."""

    layers: int
    hidden: int
    heads: int
    groups: int
    ffn: int
    vocab: int
    lengths: tuple[int, ...]
    repetitions: int = 5

    def config(self) -> TransformerConfig:
        return TransformerConfig(
            num_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            num_query_groups=self.groups,
            ffn_hidden_size=self.ffn,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func="silu",
            add_bias_linear=False,
            rotary_base=500000.0,
        )


#: Llama 3.2 1B with a vocabulary of 32K
LARGE = Sizes(16, 2048, 32, 8, 8192, 32768, (8192, 32768))
SMALL = Sizes(4, 512, 8, 2, 1536, 4096, (2048,))
TINY = Sizes(2, 64, 4, 2, 128, 256, (64,), repetitions=1)


def make_model(sizes: Sizes, device: torch.device, *, seed: int | None = None, **keys) -> GPTModel:
    """A model on its device; ``seed`` None fills it with numbers that are quick to make."""
    init_distributed(device.type)
    mesh = ParallelMesh.build(MeshSizes(), device.type)
    with torch.device("meta"):
        model = GPTModel(sizes.config(), sizes.vocab, max(sizes.lengths), pg_collection=mesh.groups)
    parallelize(model, mesh, seed=seed, device=device, **keys)
    if seed is None:
        fill(model)
    return model


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Small random numbers, a block of them over and over; ones for norms."""
    for parameter in model.parameters():
        held = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if held.dim() == 1:
            held.fill_(1.0)
            continue
        flat = held.view(-1)
        block = torch.randn(min(len(flat), 1 << 20), device=held.device) * 0.02
        for part in flat.split(len(block)):
            part.copy_(block[: len(part)])


def batch(sizes: Sizes, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """tokens and labels [1, length], the same on every device."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, sizes.vocab, (1, length + 1), generator=g)
    return tokens[:, :-1].to(device), tokens[:, 1:].to(device)


def loss_of(model: GPTModel, sizes: Sizes, length: int, device: torch.device, documents: bool) -> Tensor:
    """The mean loss of one row, packed with documents or one sequence."""
    tokens, labels = batch(sizes, length, device)
    cu = [0, length // 3, length // 3 + 1, length] if documents else [0, length]
    layout = SequenceLayout.contiguous(length, 1, cu_seqlens=cu)
    return model(tokens, labels=labels, layout=layout).sum() / length


def switch_parts(model: GPTModel, compiled: bool, device: torch.device) -> None:
    """Compiles the parts, or not. On the CPU, where only the tests run, no code is generated: that takes most of the time."""
    compile_parts(model, "aot_eager" if compiled and device.type == "cpu" else compiled)


# --- one step against the CPU's ---------------------------------------------------------------


def gradients(model: GPTModel, sizes: Sizes, device: torch.device) -> tuple[float, dict[str, Tensor]]:
    loss = loss_of(model, sizes, sizes.lengths[0], device, documents=True)
    loss.backward()
    grads = {name: p.grad.full_tensor().double().cpu() for name, p in model.named_parameters()}
    model.zero_grad()
    return loss.item(), grads


def step(rows: Rows, device: torch.device, tiny: bool) -> None:
    """bfloat16 may differ from the CPU's float32 at most twice as much as the CPU's own bfloat16 does; float32
    by 1e-4 of each gradient's largest element."""
    sizes, cpu = TINY if tiny else SMALL, torch.device("cpu")
    init_distributed(device.type)  # before the CPU's runs, which would start a group of theirs

    def run(where: torch.device, compiled: bool = False, **keys) -> tuple[float, dict[str, Tensor]]:
        model = make_model(sizes, where, seed=1, **keys)
        switch_parts(model, compiled, where)
        return gradients(model, sizes, where)

    exact_loss, exact = run(cpu)
    bf16 = {"compute_dtype": torch.bfloat16}

    def errors(got: tuple[float, dict[str, Tensor]]) -> tuple[float, float, str]:
        """Relative error of the loss, and of the worst gradient with its name."""
        each = {name: ((got[1][name] - g).abs().max() / g.abs().max()).item() for name, g in exact.items()}
        worst = max(each, key=lambda name: each[name] if math.isfinite(each[name]) else math.inf)
        return abs(got[0] - exact_loss) / exact_loss, each[worst], worst

    loss_error, grad_error, _ = errors(run(cpu, **bf16))
    allowed = max(2 * loss_error, 1e-3), max(2 * grad_error, 1e-2)
    print(f"the CPU's bfloat16 against its float32: loss {loss_error:.2e}, gradients {grad_error:.2e}")
    contestants: dict[str, tuple[dict, tuple[float, float]]] = {
        "bf16": (bf16, allowed),
        "float32": ({}, (1e-5, 1e-4)),
        "bf16, full recomputation": (bf16 | {"recompute": "full"}, allowed),
        "bf16, selective recomputation, tiles": (bf16 | {"recompute": "selective", "mlp_tiles": 3}, allowed),
        "bf16, activations offloaded": (bf16 | {"activation_offloading": True}, allowed),
        "bf16, torch_compile": (bf16 | {"compiled": True}, allowed),
    }
    for name, (keys, (most_loss, most_grad)) in contestants.items():
        try:
            loss_error, grad_error, worst = errors(run(device, **keys))
        except Exception as error:
            rows.failed(name, error)
            continue
        ok = loss_error <= most_loss and grad_error <= most_grad
        rows.add(
            name,
            ok,
            f"worst gradient: {worst}",
            loss_error=loss_error,
            grad_error=grad_error,
            allowed=most_grad,
        )


# --- speed and memory of a 1B-class model -----------------------------------------------------


def measured(
    rows: Rows,
    case: str,
    sizes: Sizes,
    length: int,
    device: torch.device,
    train: Callable[[int], None],
    wrong: bool | None = False,
) -> bool:
    """Tokens a second and peak memory of ``train(length)``, one step; memory that runs out is a row.

    Args:
        wrong: whether another error counts as ours.

    Returns:
        Whether it ran; what did not may have stopped halfway through a step.
    """
    try:
        # one step to warm up (and to compile), one more for what the allocator settles after it
        begun = time.perf_counter()
        train(length)
        first = time.perf_counter() - begun
        train(length)
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        times = [common.device_ms(lambda: train(length), device) for _ in range(sizes.repetitions)]
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        ms = statistics.median(times)
        rows.add(case, None, "", tokens_per_s=1e3 * length / ms, ms=ms, peak_gib=peak, first_step_s=first)
        return True
    except Exception as error:
        rows.failed(case, error, wrong)
        return False


def let_go(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Ours:
    """A model with its optimizer; the keys that save memory are switched on the live model."""

    def __init__(self, sizes: Sizes, device: torch.device, **keys):
        self.sizes, self.device = sizes, device
        self.model = make_model(
            sizes, device, compute_dtype=torch.bfloat16, reshard_after_forward=False, **keys
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def switch(
        self,
        recompute: str = "none",
        offload: bool = False,
        tiles: int | None = 1,
        compiled: bool = False,
        reshard: bool = False,
    ) -> None:
        moved = Offload(self.device) if offload else None
        for layer in self.model.decoder.layers.values():
            layer.set_reshard_after_forward(reshard)
            layer.recompute, layer.offload, layer.tiles = recompute, moved, tiles
        switch_parts(self.model, compiled, self.device)

    def step(self, length: int) -> None:
        self.optimizer.zero_grad()
        loss_of(self.model, self.sizes, length, self.device, documents=False).backward()
        clip_gradients(self.model, gradient_norm(self.model), 1.0)
        self.optimizer.step()


def run_keys(
    rows: Rows, sizes: Sizes, device: torch.device, cases: dict[str, dict], make: Callable[[], Ours]
) -> None:
    ours = make()
    for length in sizes.lengths:
        for name, keys in cases.items():
            ours.switch(**keys)
            ran = measured(rows, f"{length:,} tokens: {name}", sizes, length, device, ours.step)
            ours.optimizer.zero_grad()
            if not ran:  # FSDP's state is that of a step that broke off
                del ours
                let_go(device)
                ours = make()
            let_go(device)


def speed(rows: Rows, device: torch.device, tiny: bool) -> None:
    """With and without each key that saves memory."""
    sizes = TINY if tiny else LARGE
    cases: dict[str, dict] = {
        "no key": {},
        "gradient_checkpointing: full": {"recompute": "full"},
        "gradient_checkpointing: selective": {"recompute": "selective"},
        "gradient_checkpointing: offload": {"recompute": "full", "offload": True},
        "activation_offloading": {"offload": True},
        "tiled_mlp": {"tiles": None},
        "reshard_after_forward": {"reshard": True},
        "gradient_checkpointing: full, tiled_mlp": {"recompute": "full", "tiles": None},
    }
    run_keys(rows, sizes, device, cases, lambda: Ours(sizes, device))


def compiled(rows: Rows, device: torch.device, tiny: bool) -> None:
    """torch_compile on and off in one process."""
    sizes = TINY if tiny else LARGE
    cases: dict[str, dict] = {
        "no key, again": {},
        "torch_compile": {"compiled": True},
        "torch_compile, gradient_checkpointing: full": {"compiled": True, "recompute": "full"},
    }
    run_keys(rows, sizes, device, cases, lambda: Ours(sizes, device))


def parameters(rows: Rows, device: torch.device, tiny: bool) -> None:
    """Weights and optimizer in the CPU's memory."""
    sizes = TINY if tiny else LARGE
    full: dict[str, dict] = {"recompute": "full"}
    name = "gradient_checkpointing: full, offload_params"
    run_keys(rows, sizes, device, {name: full}, lambda: Ours(sizes, device, offload_params=True))


# --- the peer ---------------------------------------------------------------------------------


class Peer:
    """transformers' Llama of the same sizes: float32 weights, autocast, AdamW, clipping."""

    def __init__(self, sizes: Sizes, device: torch.device, attention: str, checkpointing: bool):
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=sizes.vocab,
            hidden_size=sizes.hidden,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.groups,
            intermediate_size=sizes.ffn,
            max_position_embeddings=1 << 20,
            use_cache=False,
        )
        config._attn_implementation = attention
        self.sizes, self.device, self.sdpa = sizes, device, attention == "sdpa"
        with device:
            self.model = LlamaForCausalLM(config)
        fill(self.model)
        if checkpointing:
            self.model.gradient_checkpointing_enable()
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def kernel(self) -> contextlib.AbstractContextManager:
        """Holds SDPA to its flash kernel, in the recomputation of a backward pass too."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if self.sdpa else contextlib.nullcontext()

    def step(self, length: int) -> None:
        self.optimizer.zero_grad()
        tokens, _ = batch(self.sizes, length, self.device)
        with self.kernel():
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = self.model(tokens, labels=tokens).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def peer_kinds() -> Iterator[tuple[str, str]]:
    yield "SDPA's flash kernel", "sdpa"
    if has_package("flash_attn"):
        yield "flash-attn", "flash_attention_2"


def peer(rows: Rows, device: torch.device, tiny: bool) -> None:
    """transformers on the same card, as it is and with gradient checkpointing."""
    sizes = TINY if tiny else LARGE
    if not has_package("transformers"):
        rows.add("transformers", None, "skipped: transformers is not installed")
        return
    for kind, attention in peer_kinds():
        for checkpointing in (False, True):
            name = f"transformers, {kind}" + (", gradient checkpointing" if checkpointing else "")
            try:
                held = Peer(sizes, device, attention, checkpointing)
            except Exception as error:
                rows.failed(name, error, None)
                continue
            for length in sizes.lengths:
                measured(rows, f"{length:,} tokens: {name}", sizes, length, device, held.step, None)
                held.optimizer.zero_grad()
                let_go(device)
            del held
            let_go(device)
    if not has_package("flash_attn"):
        rows.add("transformers with flash-attn", None, "skipped: flash_attn is not installed")
