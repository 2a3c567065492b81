"""Hybrid models in a config: what may be said, and the one message for what may not."""

import pytest

from longspan import TransformerConfig
from longspan.config.architecture import Architecture
from longspan.config.load import make_config
from longspan.config.parameters import parameter_shapes
from longspan.config.resolve import resolve
from longspan.context_parallel.move_features import FeatureMove
from longspan.context_parallel.recurrent_costs import chosen_way, recurrent_sizes
from longspan.errors import UserError

MODEL = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "learning_rate": 1e-3,
    "vocab_size": 97,
    "datasets": [{"path": "data"}],
    "sequence_len": 64,
    "max_steps": 1,
    "device": "cpu",
    "bf16": False,
    "export_hf": False,
}
TYPES = {
    "layer_types": ["mamba", "gated_delta", "attention", "mamba"],
    "mamba_num_groups": 1,
    "mamba_head_dim": 8,
}
MAMBA = {"layer_types": ["mamba"] * 4, "mamba_num_groups": 2, "mamba_head_dim": 8}


def problems(world=8, **values):
    reading = make_config(MODEL | values)
    try:
        resolve(reading.config, world, bad_keys=reading.bad, earlier=reading.problems)
    except UserError as error:
        return [one for one in error.problems if "data" not in one.split()[:2]]
    return []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_types": ["mamba", "attention"]}, "layer_types has 2 entries, and num_layers is 4: each layer has one"),
        ({"hybrid_override_pattern": "M*"}, "hybrid_override_pattern has 2 letters, and num_layers is 4"),
        ({"hybrid_override_pattern": "M*-X"}, "hybrid_override_pattern has the letter 'X': a layer is M"),
        ({"layer_types": ["mamba", "atention"] * 2}, "'atention': a layer is one of attention, mamba, gated_delta. Did you mean attention?"),
        ({"layer_types": ["linear_attention", "attention"] * 2}, "Did you mean gated_delta?"),
        ({"hybrid_override_pattern": "M*M*", "layer_types": ["mamba"] * 4}, "disagree: layer 2 is mamba in the list and * (attention) in the pattern"),
        ({"hybrid_override_pattern": "M*EM"}, "has layers of experts (E), and num_moe_experts is None"),
        ({"hybrid_override_pattern": "M*-M", "num_moe_experts": 4}, "has no layer of experts (E), and num_moe_experts is 4"),
        (TYPES | {"mamba_num_heads": 6, "mamba_num_groups": 4}, "mamba_num_heads 6 is not divisible by mamba_num_groups 4"),
        (TYPES | {"linear_num_value_heads": 24}, "linear_num_value_heads 24 is not divisible by linear_num_key_heads 16"),
        ({"mamba_state_dim": 64}, "mamba_state_dim 64 has no effect without layers of type mamba"),
        ({"linear_num_key_heads": 8}, "linear_num_key_heads 8 has no effect without layers of type gated_delta"),
        (TYPES | {"tensor_parallel_size": 2}, "mamba_num_groups 1 is not divisible by tensor_parallel_size 2"),
        (
            {"layer_types": ["mamba"] * 4, "mamba_num_heads": 12, "mamba_num_groups": 12, "context_parallel_size": 8, "ssm_cp_type": "a2a"},
            "which do not divide by context_parallel_size 8",
        ),
        (
            {"layer_types": ["mamba"] * 4, "mamba_num_heads": 24, "mamba_num_groups": 3, "context_parallel_size": 4, "ssm_cp_type": "a2a"},
            "leave 3 groups a tensor parallel rank, and context_parallel_size is 4: one of the two must divide the other",
        ),
        (TYPES | {"cp_layout": "zigzag", "context_parallel_size": 2}, "cp_layout 'zigzag' with recurrent layers (layer_types)"),
        (
            TYPES | {"hybrid_context_parallel": True, "max_seqlen_per_dp_cp_rank": 16, "context_parallel_size": 2},
            "hybrid_context_parallel with recurrent layers (layer_types)",
        ),
        ({"ssm_cp_type": "a2a"}, "ssm_cp_type a2a has no effect without recurrent layers"),
        ({"attention_cp_layout": "zigzag"}, "attention_cp_layout 'zigzag' has no effect without recurrent layers"),
        (MAMBA | {"sliding_window": 8}, "sliding_window 8 has no effect without layers of type attention"),
        (MAMBA | {"attention_output_gate": True}, "attention_output_gate True has no effect without layers of type attention"),
        (MAMBA | {"attention_cp_layout": "zigzag"}, "attention_cp_layout 'zigzag' has no effect without layers of attention (layer_types)"),
        (MAMBA | {"cp_comm_type": "a2a"}, "cp_comm_type 'a2a' has no effect without layers of attention (layer_types). Leave it out; ssm_cp_type"),
    ],
)  # fmt: skip
def test_one_clear_message(values, message):
    found = problems(**values)
    assert len(found) == 1, found
    assert message in found[0]


def test_what_goes_together():
    for values in (
        TYPES | {"context_parallel_size": 8},
        TYPES | {"context_parallel_size": 4, "ssm_cp_type": "a2a", "linear_num_key_heads": 2},
        TYPES | {"cp_layout": "contiguous", "attention_cp_layout": "balanced", "context_parallel_size": 2},
        {"layer_types": ["attention"] * 4},
        # They agree, and the pattern decides about the MLPs.
        {"hybrid_override_pattern": "*M*M", "layer_types": ["attention", "mamba"] * 2, "mamba_head_dim": 8},
    ):
        assert problems(**values) == []


def test_megatrons_flags_are_the_same_keys():
    from longspan.config.dialects.megatron import parse_megatron_flags

    flags = "--hybrid-override-pattern M-M* --mamba-num-heads 8 --mamba-state-dim 16 --mamba-num-groups 2 --squared-relu"
    found = parse_megatron_flags(flags.split())[0].config
    assert found.hybrid_override_pattern == "M-M*"
    assert (found.mamba_num_heads, found.mamba_state_dim) == (8, 16)
    assert found.activation_func == "squared_relu"


def test_a_layer_has_the_parts_of_its_letter():
    sizes = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4}
    model = Architecture(**sizes, hybrid_override_pattern="M-*E", num_moe_experts=2, mamba_head_dim=8)
    assert [tuple(model.parts_of_layer(n)) for n in range(1, 5)] == [
        ("mamba", None), (None, "dense"), ("attention", None), (None, "experts"),
    ]  # fmt: skip
    assert model.expert_layers == [4]
    assert model.mamba_num_heads == 8
    names = [n for n in parameter_shapes(model, 9) if n.startswith("decoder.layers.1.")]
    assert all("mlp" in n or "pre_mlp" in n for n in names)


def test_a_config_object_refuses_too():
    with pytest.raises(ValueError, match="layer_types 3: it is a list of mixers"):
        TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, layer_types=3)
    with pytest.raises(ValueError, match="ssm_cp_type 'heads': one of auto, state, a2a"):
        TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, ssm_cp_type="heads")
    with pytest.raises(ValueError, match="one of the two must divide the other"):
        FeatureMove.of(3, [(8, False)], 4, 4)


def test_auto_takes_what_sends_fewer_bytes():
    model = Architecture(
        num_layers=1, hidden_size=128, num_attention_heads=4, layer_types=["mamba"], mamba_num_groups=1
    )
    sizes = recurrent_sizes(model, "mamba", 1)
    assert chosen_way("auto", sizes, rows=8, batch=1, ranks=2, element=4) == "a2a"
    assert chosen_way("auto", sizes, rows=4096, batch=1, ranks=2, element=4) == "state"
    # Four heads do not divide by 3 ranks, so states travel whatever they cost.
    assert chosen_way("auto", sizes, rows=8, batch=1, ranks=3, element=4) == "state"
    assert chosen_way("a2a", sizes, rows=4096, batch=1, ranks=2, element=4) == "a2a"
