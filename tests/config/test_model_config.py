"""TransformerConfig: Megatron's fields and defaults, what is derived, and what is refused with which words."""

import copy
import dataclasses
import pickle

import pytest
import torch

import longspan
from longspan import AttnMaskType, ModelParallelConfig, TransformerConfig
from longspan.config.model import normal_comm_type, padded_vocab_size


def make(**kwargs):
    return TransformerConfig(**(dict(num_layers=2, hidden_size=64, num_attention_heads=8) | kwargs))


def test_contract_fields():
    """The fields that contracts.md names."""
    names = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert names >= {
        *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
        *("ffn_hidden_size", "normalization", "layernorm_epsilon", "gated_linear_unit", "activation_func"),
        *("add_bias_linear", "init_method_std", "params_dtype", "bf16", "layernorm_zero_centered_gamma"),
        *(
            "perform_initialization",
            "attention_dropout",
            "hidden_dropout",
            "sequence_parallel",
            "cp_comm_type",
        ),
        *(
            "hierarchical_context_parallel_sizes",
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
        ),
        *("context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"),
        *("num_moe_experts", "moe_router_topk", "moe_aux_loss_coeff"),
    }
    assert issubclass(TransformerConfig, ModelParallelConfig)
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().hidden_size = 3


def test_defaults():
    config = make()
    assert (config.num_query_groups, config.kv_channels, config.ffn_hidden_size) == (8, 8, 256)
    assert (config.init_method_std, config.layernorm_epsilon, config.normalization) == (
        0.02,
        1e-5,
        "LayerNorm",
    )
    assert (config.attention_dropout, config.hidden_dropout) == (0.0, 0.0)
    assert config.perform_initialization
    assert config.add_bias_linear
    assert not config.gated_linear_unit
    sizes = [field.name for field in dataclasses.fields(config) if field.name.endswith("model_parallel_size")]
    assert all(getattr(config, name) in (1, None) for name in sizes)


def test_given_values_stay():
    config = make(num_query_groups=2, kv_channels=32, ffn_hidden_size=96, params_dtype=torch.bfloat16)
    assert (config.num_query_groups, config.kv_channels, config.ffn_hidden_size) == (2, 32, 96)
    assert config.params_dtype is torch.bfloat16
    # the head size need not be hidden / heads
    assert make(hidden_size=60, num_attention_heads=8, kv_channels=16).kv_channels == 16


def test_replace_checks_again():
    config = dataclasses.replace(make(num_query_groups=4), tensor_model_parallel_size=4)
    assert config.tensor_model_parallel_size == 4
    with pytest.raises(ValueError, match="num_query_groups 4"):
        dataclasses.replace(config, tensor_model_parallel_size=8)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            dict(num_attention_heads=7),
            r"hidden_size 64 is not divisible by num_attention_heads 7.*kv_channels",
        ),
        (dict(num_query_groups=3), r"num_attention_heads 8 is not divisible by num_query_groups 3"),
        (
            dict(num_attention_heads=6, hidden_size=48, tensor_model_parallel_size=4),
            r"num_attention_heads 6 is not divisible by tensor_parallel_size 4.*1, 2, 3, 6",
        ),
        (
            dict(num_query_groups=2, tensor_model_parallel_size=4),
            r"num_query_groups 2 .*not divisible by tensor_parallel_size 4.*1, 2.*context_parallel_size",
        ),
        (
            dict(ffn_hidden_size=98, tensor_model_parallel_size=4),
            r"ffn_hidden_size 98.*tensor_parallel_size 4",
        ),
        (
            dict(num_attention_heads=3, hidden_size=48, ffn_hidden_size=96, tensor_model_parallel_size=3),
            r"tensor_parallel_size 3 does not divide 128.*vocabulary",
        ),
        (dict(kv_channels=5), r"kv_channels 5.*odd.*even"),
        (dict(normalization="BatchNorm"), r"'BatchNorm': RMSNorm or LayerNorm"),
        (dict(position_embedding_type="alibi"), r"'alibi'.*rope, learned_absolute, none"),
        (dict(attention_dropout=0.1), r"attention_dropout=0.1.*Set it to 0"),
        (dict(hidden_dropout=0.1), r"hidden_dropout=0.1.*Set it to 0"),
        (dict(cp_comm_type="ring"), r"cp_comm_type 'ring'.*p2p, all_gather, a2a, a2a\+p2p"),
        (dict(cp_comm_type=["p2p", "ring"]), r"cp_comm_type 'ring'.*p2p"),
        (
            dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
            r"rope_scaling of type yarn: original_max_position_embeddings missing",
        ),
        (
            dict(context_parallel_size=8, hierarchical_context_parallel_sizes=(2, 2)),
            r"\[2, 2\]: their product is 4, context_parallel_size is 8.*equal",
        ),
        (
            dict(context_parallel_size=4, hierarchical_context_parallel_sizes=(-2, -2)),
            r"\[-2, -2\]: the size of a level is at least 1",
        ),
    ],
)
def test_refusals(given, words):
    with pytest.raises(ValueError, match=words):
        make(**given)


@pytest.mark.parametrize(
    "name",
    [
        *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
        *("ffn_hidden_size", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
        *("virtual_pipeline_model_parallel_size", "context_parallel_size"),
        *("expert_model_parallel_size", "expert_tensor_parallel_size"),
    ],
)
def test_sizes_are_at_least_one(name):
    for value in (0, -1):
        with pytest.raises(ValueError, match=rf"{name}={value}: a.* size is at least 1"):
            make(**{name: value})


def test_a_misspelt_field_is_refused():
    with pytest.raises(TypeError, match="num_heads"):
        make(num_heads=8)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("moe_upcycling_granularity", "other options of experts"),
        ("pipeline_dtype", "other options of pipelines"),
        ("num_layers_in_first_pipeline_stage", "other options of pipelines"),
        ("account_for_loss_in_pipeline_split", "other options of pipelines"),
        ("mtp_num_layers", r"several predicted tokens \(MTP\)"),
        ("kv_lora_rank", r"compressed keys and values \(MLA\)"),
        ("mamba_training_chunk", "other options of recurrent layers"),
        ("fp8_recipe", "8-bit"),
    ],
)
def test_fields_of_what_is_not_there_yet_are_refused_by_that_reason(name, what):
    with pytest.raises(ValueError, match=rf"^{name}: {what}.* are not supported yet"):
        make(**{name: 1})
    with pytest.raises(ValueError, match="are not supported yet"):
        ModelParallelConfig(**{name: 1})


def test_a_config_can_be_copied_and_pickled():
    config = make(num_query_groups=4)
    assert (
        copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == dataclasses.replace(config) == config
    )


def test_hierarchical_sizes():
    sizes = make(context_parallel_size=8, hierarchical_context_parallel_sizes=[4, 2])
    assert sizes.hierarchical_context_parallel_sizes == (4, 2)


def test_communication_type_of_a_layer():
    assert [make().comm_type_of_layer(layer) for layer in (1, 2)] == ["p2p", "p2p"]
    assert make(cp_comm_type="allgather").comm_type_of_layer(1) == "all_gather"
    mixed = make(num_layers=3, cp_comm_type=["p2p", "allgather", "a2a"])
    assert [mixed.comm_type_of_layer(layer) for layer in (1, 2, 3)] == ["p2p", "all_gather", "a2a"]
    assert normal_comm_type("a2a+p2p") == "a2a+p2p"


def test_mask_types():
    assert {kind.name for kind in AttnMaskType} == {"causal", "no_mask", "padding", "padding_causal"}
    assert [kind.name for kind in AttnMaskType if kind.is_causal] == ["causal", "padding_causal"]


def test_padded_vocabulary_is_a_multiple_of_128():
    assert [padded_vocab_size(n) for n in (1, 128, 129, 50257, 128256)] == [128, 128, 256, 50304, 128256]


def test_names_of_the_package():
    for name in ("AttnMaskType", "ModelParallelConfig", "TransformerConfig"):
        assert getattr(longspan, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        longspan.no_such_name  # noqa: B018
