"""A model that transformers' own class computes: made on ``meta``, sharded, and filled, as ``parallelize`` does natively.

    1. make       the class on ``meta``, its attention by ``longspan``; adapters by PEFT
    2. recompute  the class's own gradient checkpointing, layer by layer
    3. shard      FSDP2, one group a layer, and one for the rest (tied weights are in it together)
    4. fill       buffers by the class, weights from files (``class_weights``) or drawn by seed and name
    5. compare    one short sequence, cut and by chunks, with the class's own loss of it whole

Imported only where such a model is trained, because it imports transformers.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from longspan.config.families import any_type
from longspan.config.families.hub import model_config, model_folder
from longspan.config.lora import ALL_LINEAR, Lora
from longspan.config.run import Run
from longspan.context_parallel import SequenceLayout
from longspan.errors import UserError, did_you_mean
from longspan.integrations.causal_lm import CausalLM
from longspan.mesh.mesh import ParallelMesh, ProcessGroupCollection
from longspan.models.hf_weights import SafetensorsFolder
from longspan.parallelize import offload_policy, shard
from longspan.tensor_parallel.random import Constant, Uniform, fill
from longspan.training import class_weights

#: relative difference up to which a class's own loss (computed in float32) and ours are one loss
SAME = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 3e-2}
#: what a class raises that does not work with longspan's attention; errors of communication are none of these
OF_A_CLASS = (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError)
#: tokens of each rank in the comparison
COMPARED = 16


def class_on_meta(run: Run) -> Any:
    """transformers' class of the run's base model, without memory for its weights.

    Raises:
        UserError: the class cannot be made, or does not let its attention be chosen.
    """
    from transformers.utils import logging

    assert run.config.base_model is not None
    data, where = model_config(run.config.base_model)
    config = any_type.config_of(data, where)
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False
    logging.set_verbosity_error()
    try:
        hf = make_on_meta(config, getattr(torch, run.precision.params_dtype))
    except UserError:
        raise
    # A class raises errors of many kinds for fields that do not fit each other.
    except Exception as error:
        raise UserError(
            f"base_model: {where} ({data.get('model_type')}): transformers' class cannot be made with longspan's attention "
            f"({type(error).__name__}: {error})."
        ) from None
    if getattr(hf, hf.base_model_prefix, hf) is hf:
        raise UserError(
            f"base_model: {where}: {type(hf).__name__} has no base model below its head, so its loss cannot be computed in parts."
        )
    return hf


def make_on_meta(config: Any, dtype: torch.dtype) -> Any:
    """transformers' class of a config object, on ``meta``, its attention by ``longspan``.

    Raises:
        UserError: the class computes its attention by itself.
    """
    from transformers import AutoModelForCausalLM

    # Registers the name ``longspan`` with transformers.
    import longspan.integrations.transformers  # noqa: F401

    # torch has no grouped product in float64.
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="longspan", **experts)
    # transformers looks into the class's source; without the interface the choice would be ignored.
    can_choose = getattr(type(hf), "_can_set_attn_implementation", None)
    if can_choose is not None and not can_choose():
        raise UserError(
            f"base_model: {type(hf).__name__} {any_type.OWN_ATTENTION}. It cannot be trained here."
        )
    return hf


def layers_of(hf: nn.Module) -> list[nn.Module]:
    """The class's layers, which FSDP2 gathers one at a time."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in hf.modules() if isinstance(module, GradientCheckpointingLayer)]


def inject(hf: Any, lora: Lora, seed_dtype: torch.dtype | None) -> None:
    """Puts PEFT's adapters into the class's linear layers, on ``meta``; the other weights are frozen.

    Args:
        seed_dtype: dtype in which frozen weights are held; None keeps theirs.

    Raises:
        UserError: PEFT is not installed, or a target names no linear layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError(
            "adapter: lora on a model that transformers' own class computes needs PEFT: pip install 'longspan[hf]'."
        ) from None
    names = {name.split(".")[-1] for name, module in hf.named_modules() if isinstance(module, nn.Linear)}
    names -= {
        name.split(".")[-1] for name, module in hf.named_modules() if module is hf.get_output_embeddings()
    }
    for target in lora.targets:
        if target != ALL_LINEAR and target not in names:
            raise UserError(
                f"lora_target_modules: {target!r} is no linear layer of {type(hf).__name__}, which has "
                f"{', '.join(sorted(names))}.{did_you_mean(target, sorted(names))}"
            )
    config = LoraConfig(
        r=lora.rank,
        # PEFT divides by the rank; its annotation says int.
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        use_rslora=lora.rslora,
        target_modules=ALL_LINEAR if ALL_LINEAR in lora.targets else list(lora.targets),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(config, hf, low_cpu_mem_usage=True)
    for name, parameter in hf.named_parameters():
        if not class_weights.is_adapter(name):
            parameter.requires_grad_(False)
            if seed_dtype is not None:
                parameter.data = parameter.data.to(seed_dtype)


def check_class(run: Run, source: SafetensorsFolder) -> None:
    """Refuses, before processes start, weights that are not the class's, and targets of adapters that it does not have.

    Raises:
        UserError: as :func:`class_on_meta`, :func:`inject` and ``class_weights.check_names``.
    """
    hf = class_on_meta(run)
    class_weights.check_names(hf, source, class_weights.pieces_of(hf, source))
    if run.lora is not None:
        inject(hf, run.lora, None)


def fill_adapters(hf: nn.Module, seed: int) -> None:
    """Draws adapters by (seed, name, shape) as PEFT does: A uniform in +-1/sqrt(input), B zero."""
    for name, parameter in hf.named_parameters():
        if class_weights.is_adapter(name):
            starts = Uniform((3 * parameter.shape[1]) ** -0.5) if ".lora_A." in name else Constant(0.0)
            fill(parameter, starts, seed, name)


def build_class_model(
    run: Run,
    mesh: ParallelMesh,
    groups: ProcessGroupCollection,
    device: torch.device,
    compute_dtype: torch.dtype | None,
) -> CausalLM:
    """Makes the model of a run, shards it over the mesh and fills its weights. Collective.

    Raises:
        UserError: as :func:`class_on_meta`, :func:`inject`, ``class_weights.read`` and :func:`compare`.
    """
    config, memory = run.config, run.memory
    hf = class_on_meta(run)
    if run.lora is not None:
        inject(hf, run.lora, compute_dtype)
    if memory.recompute == "full":
        hf.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        hf.enable_input_require_grads() if run.lora is not None else None
    model = CausalLM(
        hf,
        groups,
        cp_comm_type=config.cp_comm_type,
        deterministic=config.deterministic_mode,
        backend=config.attention_backend,
    )
    policy = offload_policy(memory.offload_params, device)
    shard(model, layers_of(hf), mesh, compute_dtype, memory.reshard_after_forward, policy)
    model.to_empty(device=torch.device("cpu") if memory.offload_params else device)
    class_weights.compute_buffers(hf)
    if run.pretrained is not None:
        class_weights.read(hf, SafetensorsFolder(model_folder(run.pretrained)))
    else:
        class_weights.draw(hf, config.seed)
    if run.lora is not None:
        fill_adapters(hf, config.seed)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    compare(model, run, device)
    # A forward pass leaves weights gathered, and the optimizer must find the shards.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model


@torch.no_grad()
def compare(model: CausalLM, run: Run, device: torch.device) -> None:
    """Computes one short sequence cut over the cp ranks, by chunks, and whole by the class's own loss. Collective.

    If the two differ because of the chunks, the model computes whole logits from now on, and a line says so.

    Raises:
        UserError: the losses still differ: the class computes something else than a mean over the next tokens, or its
            tokens meet elsewhere than in attention.
    """
    cp = model.groups.cp
    ranks, rank = dist.get_world_size(cp), dist.get_rank(cp)
    total = min(COMPARED * ranks, run.config.sequence_len)
    tokens = torch.randint(0, run.vocab_size, (1, total + 1), generator=torch.Generator().manual_seed(0))
    layout = SequenceLayout.make("zigzag", total, ranks)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    parts = [layout.shard(inputs, rank, dim=1), layout.shard(targets, rank, dim=1, pad_value=-100)]
    model.train()
    name = type(model.hf).__name__

    def cut() -> float:
        share = model(parts[0].to(device), labels=parts[1].to(device), layout=layout).sum(dtype=torch.float64)
        dist.all_reduce(share, group=cp)
        return share.item() / total

    try:
        own = model(inputs.to(device), labels=targets.to(device), num_targets=total).item()
    except OF_A_CLASS as error:
        raise UserError(
            f"base_model: {name} does not compute its loss with longspan's attention ({type(error).__name__}: {error})."
        ) from None
    dtype = getattr(torch, run.precision.compute_dtype)
    try:
        found = cut()
        same = abs(found - own) <= SAME[dtype] * abs(own)
        why = f"a loss of {found:.6g} by chunks, and of {own:.6g} by itself"
    # The class reads more of its base model than the hidden states.
    except OF_A_CLASS as error:
        same, why = False, f"no forward by chunks ({error})"
    if not same:
        model.whole_logits = True
        try:
            found = cut()
        except OF_A_CLASS as error:
            raise UserError(
                f"base_model: {name} does not compute a part of a sequence ({type(error).__name__}: {error})."
            ) from None
        if not abs(found - own) <= SAME[dtype] * abs(own):
            raise UserError(
                f"base_model: {name} computes a loss of {own:.6g} for a sequence, and {found:.6g} when it is cut over {ranks} "
                "ranks: its tokens meet elsewhere than in attention, or its loss is not the mean over the next tokens. It cannot "
                "be trained here."
            )
        if dist.get_rank() == 0:
            print(f"whole logits: {name} has {why}, so each rank's logits are held at once", file=sys.stderr)
