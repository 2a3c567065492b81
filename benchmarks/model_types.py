"""Which causal language models of the installed transformers compute the same on cut sequences: the table of docs/models.md.

    python benchmarks/model_types.py [--markdown] [--ranks 2] [--types phi3 gemma3_text] [--comm-type a2a]

Each type's class is made tiny, with random weights in float64, and saved. Its weights are read again as training reads
them: on meta, then the class's buffers, then the files. Its loss and gradients on two ranks, plain and packed, are compared
with the class's own (``sdpa``, each document alone, on one process), every buffer with those of ``from_pretrained``, and
what an export would write with what the class has saved. A type that is refused shows the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longspan.config.families import any_type
from longspan.config.families.config_json import FAMILIES
from longspan.context_parallel import SequenceLayout
from longspan.errors import UserError
from longspan.integrations.causal_lm import CausalLM
from longspan.models.hf_weights import SafetensorsFolder
from longspan.training import class_weights
from longspan.training.class_model import make_on_meta

VOCAB = 61
#: fields of the tiny models, by the names of most types; a type ignores those that it does not have
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "sliding_window": 7,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: fields that a type needs beside these, or of other values
SPECIAL: dict[str, dict[str, Any]] = {
    "granite": {"logits_scaling": 3.0, "residual_multiplier": 0.7, "embedding_multiplier": 2.0},
    "granitemoe": {"logits_scaling": 3.0},
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "phi": {"partial_rotary_factor": 0.5},
    "persimmon": {"num_key_value_heads": 6},
    "stablelm": {"partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_pct": 0.5},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 24},
    "xglm": {"d_model": 24, "ffn_dim": 32, "num_layers": 2, "attention_heads": 6},
    "glm4_moe": {"n_group": 1, "topk_group": 1},
    "dots1": {"n_group": 1, "topk_group": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    "deepseek_v3": {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
    | {"n_group": 1, "topk_group": 1, "head_dim": 4},
    "deepseek_v2": {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
    | {"n_group": 1, "topk_group": 1, "head_dim": 4},
    "glm4_moe_lite": {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
    | {"n_group": 1, "topk_group": 1, "head_dim": 4},
    "youtu": {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
    | {"head_dim": 4},
}  # fmt: skip
#: documents of the packed case; one of them is longer than a window, one has one token
DOCUMENTS = (1, 13, 5, 21, 3)
#: a larger model has sizes by names that are not in SIZES
MOST_WEIGHTS = 8_000_000
EXACT, ROUNDING = 1e-9, 1e-5


def _has(config: Any, name: str) -> bool:
    """Whether a config has a field, and one value of it."""
    try:
        return hasattr(config, name)
    # A field that differs by layer raises an error of its own.
    except Exception:
        return False


def tiny_config(kind: str) -> Any:
    """A config of a type with two small layers, one with a window if the type has such layers, and without dropout."""
    default = CONFIG_MAPPING[kind]()
    fields = {name: value for name, value in SIZES.items() if _has(default, name)}
    fields |= SPECIAL.get(kind, {})
    fields |= dict.fromkeys(any_type.drawn_fields({}, default), 0.0)
    config = CONFIG_MAPPING[kind](**fields)
    kinds = getattr(config, "layer_types", None)
    if kinds and set(kinds) <= any_type.LAYER_TYPES and "sliding_attention" in kinds:
        config = CONFIG_MAPPING[kind](**fields, layer_types=["sliding_attention", "full_attention"])
    return config


def tokens_of(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Tokens and their targets [1, s] of documents; a document's last token has no target."""
    generator = torch.Generator().manual_seed(1)
    inputs, targets = [], []
    for length in lengths:
        tokens = torch.randint(1, VOCAB, (length,), generator=generator)
        inputs.append(tokens)
        targets.append(F.pad(tokens[1:], (0, 1), value=-100))
    return torch.cat(inputs).unsqueeze(0), torch.cat(targets).unsqueeze(0)


def reference(hf: Any, lengths: tuple[int, ...]) -> tuple[float, dict[str, Tensor]]:
    """The class's own mean loss and gradients: each document alone, attention by sdpa."""
    hf.zero_grad()
    inputs, targets = tokens_of(lengths)
    total, count = 0.0, int((targets != -100).sum())
    for tokens, labels in zip(inputs.split(list(lengths), dim=1), targets.split(list(lengths), dim=1)):
        logits = hf(input_ids=tokens, use_cache=False).logits.double()
        loss = (
            F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
            / count
        )
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in hf.named_parameters() if p.grad is not None}


def cut(model: CausalLM, lengths: tuple[int, ...], layout_name: str) -> tuple[float, dict[str, Tensor]]:
    """The same, the sequence cut over all ranks; gradients are summed over them."""
    model.hf.zero_grad()
    inputs, targets = tokens_of(lengths)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    layout = SequenceLayout.make(layout_name, bounds[-1], ranks, cu_seqlens=bounds)
    labels = layout.shard(targets, rank, dim=1, pad_value=-100)
    losses = model(layout.shard(inputs, rank, dim=1), labels=labels, layout=layout)
    share = losses.sum() / int((targets != -100).sum())
    share.backward()
    total = share.detach().double()
    dist.all_reduce(total)
    gradients = {}
    for name, parameter in model.hf.named_parameters():
        # An expert without a token on this rank may have one on another.
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        dist.all_reduce(gradient)
        gradients[name] = gradient
    return total.item(), gradients


def difference(ours: tuple[float, dict[str, Tensor]], theirs: tuple[float, dict[str, Tensor]]) -> float:
    """The largest relative difference of loss and gradients; a gradient's is measured by its largest element."""
    worst = abs(ours[0] - theirs[0]) / abs(theirs[0])
    least = 1e-6 * max(float(g.abs().max()) for g in theirs[1].values())
    for name, found in ours[1].items():
        expected = theirs[1].get(name, torch.zeros_like(found))
        error = float((found - expected).abs().max()) / max(float(expected.abs().max()), least)
        # A comparison with NaN is false, so NaN counts as the worst.
        worst = error if not error <= worst else worst
    return worst


def read_again(folder: str, data: dict[str, Any]) -> Any:
    """The saved class as training reads it, in float64."""
    config = any_type.config_of(data, "config.json")
    hf = make_on_meta(config, torch.float64)
    hf.to_empty(device="cpu")
    # Without FSDP memory is made for each name, so tied weights are tied again.
    hf.tie_weights()
    class_weights.compute_buffers(hf)
    class_weights.read(hf, SafetensorsFolder(folder))
    return hf.train()


def buffers_differ(ours: Any, theirs: Any) -> list[str]:
    found, expected = dict(ours.named_buffers()), dict(theirs.named_buffers())
    return [
        name
        for name in found.keys() | expected.keys()
        if name not in found
        or name not in expected
        or not torch.equal(found[name].double(), expected[name].double())
    ]


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def _by_itself(config: Any) -> Any:
    """The class with its own attention, sdpa where it has it."""
    for attention in ("sdpa", "eager"):
        with contextlib.suppress(ValueError):
            return transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, dtype=torch.float64, experts_implementation="eager"
            )
    raise ValueError("neither sdpa nor eager attention")


def verdict(kind: str, comm_type: str, layout: str, folder: str) -> dict[str, Any]:
    """What is found out about one type; collective."""
    if kind in any_type.CANNOT_BE_CUT:
        return {"type": kind, "verdict": "refused", "why": any_type.CANNOT_BE_CUT[kind]}
    try:
        config = tiny_config(kind)
        data = json.loads(json.dumps(config.to_dict(), default=str)) | {"model_type": kind}
        any_type.keys_of(data, "config.json")
    except UserError as error:
        text = error.problems[0].split(") ", 1)[-1].removeprefix("base_model: ")
        return {"type": kind, "verdict": "refused", "why": text.split(": only")[0].split(". ")[0]}
    except Exception as error:
        return {
            "type": kind,
            "verdict": "not tried",
            "why": f"no tiny config ({_short(error)})",
        }
    torch.manual_seed(0)
    try:
        if (
            weights := sum(p.numel() for p in make_on_meta(config, torch.float64).parameters())
        ) > MOST_WEIGHTS:
            return {"type": kind, "verdict": "not tried", "why": f"no tiny config: {weights:,} weights"}
        theirs = _by_itself(config)
    except Exception as error:
        return {"type": kind, "verdict": "not tried", "why": _short(error)}
    theirs = theirs.double().train()
    if dist.get_rank() == 0:
        theirs.save_pretrained(folder)
    dist.barrier()
    result: dict[str, Any] = {"type": kind, "class": type(theirs).__name__}
    try:
        ours = read_again(folder, data)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float64,
            experts_implementation="eager",
            attn_implementation=theirs.config._attn_implementation,
        )
        if wrong := buffers_differ(ours, loaded):
            raise AssertionError(f"buffers differ: {', '.join(sorted(wrong)[:3])}")
        saved = SafetensorsFolder(folder)
        written = dict(class_weights.whole_for_files(ours))
        if set(written) != set(saved.files):
            raise AssertionError(f"an export differs: {sorted(set(written) ^ set(saved.files))[:3]}")
        if odd := [key for key, whole in written.items() if not torch.equal(whole, saved.slice(key)[...])]:
            raise AssertionError(f"an export differs: {odd[:3]}")
        groups = SimpleNamespace(cp=dist.group.WORLD, hcp=())
        model = CausalLM(ours, groups, cp_comm_type=comm_type)
        for case, lengths in (("plain", (43,)), ("packed", DOCUMENTS)):
            try:
                found = cut(model, lengths, layout)
            # Its forward reads more of its base model than the hidden states; training finds it in the same way.
            except AttributeError:
                model.whole_logits = True
                found = cut(model, lengths, layout)
            result[case] = difference(found, reference(loaded.train(), lengths))
    except UserError as error:
        return {"type": kind, "verdict": "refused", "why": error.problems[0]}
    except Exception as error:
        return result | {"verdict": "fails", "why": _short(error)}
    worst = max(result["plain"], result["packed"])
    result["verdict"] = "same" if worst <= EXACT else "same in float32" if worst <= ROUNDING else "differs"
    if model.whole_logits:
        result["verdict"] += ", whole logits"
    return result


def look(types: list[str], comm_type: str, layout: str, out: str) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = []
    for kind in types:
        with tempfile.TemporaryDirectory() as own:
            shared = [own]
            dist.broadcast_object_list(shared, src=0)
            results.append(verdict(kind, comm_type, layout, shared[0]))
            dist.barrier()
        if dist.get_rank() == 0:
            print(json.dumps(results[-1]), flush=True)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(results))


def markdown(results: list[dict[str, Any]]) -> str:
    """The tables of docs/models.md: the types that compute the same, and the others with the reason."""
    lines = ["| type | class | plain | packed | verdict |", "|---|---|---|---|---|"]
    for one in results:
        if "plain" in one:
            native = ", native by default" if one["type"] in FAMILIES else ""
            errors = f"{one['plain']:.0e} | {one['packed']:.0e}"
            lines.append(f"| `{one['type']}` | {one['class']} | {errors} | {one['verdict']}{native} |")
    lines += ["", "| type | verdict | why |", "|---|---|---|"]
    for one in results:
        if "plain" not in one:
            why = " ".join(one["why"].removeprefix("base_model: ").replace("|", " ").split()).rstrip(".")
            lines.append(f"| `{one['type']}` | {one['verdict']} | {why} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="*", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--comm-type", default="p2p")
    parser.add_argument("--layout", default="zigzag")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/models.md")
    given = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "results.json")
        common.run_ranks(given.ranks, look, given.types, given.comm_type, given.layout, out)
        results = json.loads(Path(out).read_text())
    if given.markdown:
        print(markdown(results))


if __name__ == "__main__":
    main()
