"""Tiny random models of transformers' own classes, as folders, and runs from them."""

import pathlib
import sys

import torch

import tiny
from longspan.config.load import make_config
from longspan.config.resolve import resolve
from longspan.config.run import Run

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"

#: type -> fields beside the sizes; each has something that a Llama has not
KINDS = {
    # query, key and value in one layer, gate and up too
    "phi3": {},
    # two sizes of rotary tables, scaled embeddings, norms minus 1, tied ends, a window in one layer
    "gemma3_text": {
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    # a scale between head and loss
    "granite": {"logits_scaling": 3.0, "residual_multiplier": 0.7},
    # experts that lie in files one by one, and a bias that is a buffer
    "glm4_moe": {
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    },
}


def make_folder(kind, folder, **changes):
    """A random model of a type, saved by transformers; its norms are not all ones."""
    import transformers

    sizes = {
        "vocab_size": tiny.VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
    }
    config = transformers.AutoConfig.for_model(kind, **(sizes | KINDS.get(kind, {}) | changes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return str(folder)


def values(prefix, base, **changes):
    return {
        "base_model": base,
        "datasets": [{"path": prefix}],
        "sequence_len": 50,
        "val_set_size": 0.1,
        "global_batch_size": 4,
        "max_steps": 20,
        "learning_rate": 1e-2,
        "params_dtype": "float64",
        "bf16": False,
        "device": "cpu",
        "use_tensorboard": False,
    } | changes


def class_run(prefix, base, world, **changes):
    """A run from a folder, on data that is prepared already."""
    read = make_config(values(prefix, base, **changes))
    assert not read.problems, read.problems
    return Run.of(resolve(read.config, world).config)


def benchmark():
    """The script that makes the table of docs/models.md, as a module."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    import model_types

    return model_types
