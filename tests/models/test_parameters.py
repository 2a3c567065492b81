"""The names and shapes that follow from an architecture are those of the model that is made of it."""

import pytest
import torch

import pool
from longspan import TransformerConfig
from longspan.config.parameters import parameter_shapes
from longspan.config.sizes import MeshSizes
from longspan.mesh.mesh import ParallelMesh
from longspan.models import GPTModel

LLAMA = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 12,
    "ffn_hidden_size": 48,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
}
FAMILIES = {
    "llama": {},
    "llama with biases": {"add_bias_linear": True},
    "tied": {"share_embeddings_and_output_weights": True},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True},
    "gpt2": {
        "position_embedding_type": "learned_absolute",
        "max_position_embeddings": 130,
        "normalization": "LayerNorm",
        "gated_linear_unit": False,
        "add_bias_linear": True,
        "num_query_groups": 4,
        "kv_channels": 8,
    },
    "gate, norms over heads and behind": {
        "attention_output_gate": True,
        "qk_layernorm": True,
        "qk_layernorm_over_heads": True,
        "attention_post_norm": True,
    },
    "layernorm and normalised heads": {"normalization": "LayerNorm", "qk_layernorm": True},
}
VOCAB = 97


def made(tp):
    """Family -> name -> shape of the parameters of the model itself, at ``tp`` ranks."""
    groups = ParallelMesh.build(MeshSizes(tp=tp), "cpu").groups
    found = {}
    for family, changes in FAMILIES.items():
        config = TransformerConfig(**LLAMA | changes, tensor_model_parallel_size=tp)
        with torch.device("meta"):
            model = GPTModel(config, VOCAB, 50, pg_collection=groups)
        found[family] = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return found


@pytest.mark.parametrize("tp", [1, 2])
def test_names_and_shapes_are_those_of_the_model(tp):
    for family, parameters in pool.run(tp, made, tp)[0].items():
        model = TransformerConfig(**LLAMA | FAMILIES[family])
        assert parameter_shapes(model, VOCAB) == parameters, family
