"""A tiny model on tiny data, for tests of training."""

import numpy as np
import torch

from longspan import TransformerConfig
from longspan.config.load import make_config
from longspan.config.resolve import resolve
from longspan.config.run import Run
from longspan.data import IndexedDataset, IndexedDatasetWriter

VOCAB = 97


def write_data(folder, documents=60, seed=0, vocab=VOCAB):
    """Documents of 1 to 90 tokens in which each token depends on the one before: something to learn."""
    rng = np.random.default_rng(seed)
    prefix = folder / "tiny"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            length = int(rng.choice([1, 2, 5, 20, 33, 60, 90]))
            tokens = [int(rng.integers(vocab))]
            while len(tokens) < length:
                tokens.append((tokens[-1] * 3 + int(rng.integers(2))) % vocab)
            writer.add_document(np.array(tokens))
    return str(prefix)


def write_numbered(prefix, lengths, first_token):
    """Documents whose tokens are numbered through, so that each token is known again."""
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        for length in lengths:
            writer.add_document(np.arange(first_token, first_token + length))
            first_token += length
    return IndexedDataset(prefix)


def transformer_config(sizes, **kwargs):
    """A small model in fp64 at these sizes."""
    defaults = dict(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=48,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func="silu",
        add_bias_linear=False,
        params_dtype=torch.float64,
        init_method_std=0.2,
        tensor_model_parallel_size=sizes.tp,
        context_parallel_size=sizes.cp,
        hierarchical_context_parallel_sizes=sizes.hierarchical_cp or None,
    )
    return TransformerConfig(**(defaults | kwargs))


def values(prefix, **changes):
    """A config as a dict: 2 layers, sequences of 50 tokens, fp64."""
    return {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "vocab_size": VOCAB,
        "init_method_std": 0.1,
        "datasets": [{"path": prefix}],
        "sequence_len": 50,
        "val_set_size": 0.1,
        "global_batch_size": 4,
        "max_steps": 30,
        "learning_rate": 1e-2,
        "params_dtype": "float64",
        "bf16": False,
        "device": "cpu",
        "use_tensorboard": False,
    } | changes


def checked(prefix, world, **changes):
    read = make_config(values(prefix, **changes))
    assert not read.problems, read.problems
    return resolve(read.config, world)


def tiny_run(prefix, world, **changes):
    """A run on data that is prepared already."""
    return Run.of(checked(prefix, world, **changes).config)
