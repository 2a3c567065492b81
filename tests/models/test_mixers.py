"""Recurrent mixers and hybrid models: against a sequential recurrence, and every layout against one process. fp64."""

import dataclasses
from unittest import mock

import pytest
import torch

import hybrids
import pool
from longspan import TransformerConfig, parallel_state
from longspan.config.sizes import MeshSizes
from longspan.context_parallel.move_features import FeatureMove
from longspan.mesh.default_groups import process_groups
from longspan.models import GatedDeltaMixer, MambaMixer
from longspan.models.layer import make_rows

#: documents of one token, one that begins in the middle of spans, lengths that divide by nothing
PACKED = (0, 1, 9, 30, 31, 32, 53)
#: one sequence; fewer tokens a rank than the convolution reads; at cp 4 a rank without a token
WHOLE, SHORT = (0, 53), (0, 1, 5)
PACKS = [PACKED, WHOLE, SHORT]

PATTERN = {"hybrid_override_pattern": "M*-G"}


@pytest.mark.parametrize(
    "options",
    [
        {"layer_types": ["mamba", "attention", "mamba"]},
        {
            "layer_types": ["mamba"],
            "mamba_grouped_norm": False,
            "mamba_conv_bias": False,
            "mamba_dt_min": 0.02,
        },
        {"layer_types": ["gated_delta", "gated_delta"], "linear_allow_neg_eigval": True},
        {"layer_types": ["gated_delta"], "linear_norm_epsilon": 0.1, "linear_conv_kernel_dim": 1},
        PATTERN,
    ],
    ids=str,
)
def test_one_process_equals_the_recurrence(options):
    for cu in PACKS:
        worst, name = pool.run(1, hybrids.against_plain, cu, options)[0]
        assert worst < 1e-10, (cu, name)


_references = {}


def reference(options, columns=1):
    key = repr(sorted(options.items())), columns
    if key not in _references:
        _references[key] = pool.run(1, hybrids.gradients, MeshSizes(), PACKS, options, columns)[0]
    return _references[key]


LAYOUTS = {
    "cp2": MeshSizes(cp=2),
    "cp3": MeshSizes(cp=3),
    "cp4": MeshSizes(cp=4),
    "tp2 x cp2": MeshSizes(tp=2, cp=2),
}
HEADS = {
    "mamba_num_heads": 12,
    "mamba_num_groups": 6,
    "linear_num_key_heads": 6,
    "linear_num_value_heads": 12,
}
#: fewer groups than ranks: what the heads of a group share goes to several ranks
FEW_GROUPS = {"mamba_num_groups": 2, "linear_num_key_heads": 2}


@pytest.mark.processes
@pytest.mark.parametrize("way", ["state", "a2a"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_computes_what_one_process_computes(layout, way):
    sizes, options = LAYOUTS[layout], HEADS if layout == "cp3" else {}
    for columns in (1, 2):
        found = pool.run(
            sizes.world_size, hybrids.gradients, sizes, PACKS, options | {"ssm_cp_type": way}, columns
        )[0]
        for pack, one, expected in zip(PACKS, found, reference(options, columns)):
            worst, name = hybrids.difference(one, expected)
            assert worst < 1e-10, (pack, columns, name)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (MeshSizes(cp=4), FEW_GROUPS | {"ssm_cp_type": "a2a"}),
        (MeshSizes(cp=2), {"recompute": "full", "ssm_cp_type": "state"}),
        (MeshSizes(cp=2), {"recompute": "selective", "ssm_cp_type": "a2a"}),
        (MeshSizes(tp=2, cp=2), {"sequence_parallel": True}),
        (MeshSizes(tp=2), {"sequence_parallel": True, "add_bias_linear": True}),
        (MeshSizes(tp=2), {"mamba_grouped_norm": False}),
        (MeshSizes(dp_shard=2, cp=2), {}),
        (MeshSizes(cp=2), {"cp_comm_type": "a2a", "attention_cp_layout": "zigzag"}),
        (MeshSizes(cp=2), {"attention_cp_layout": "contiguous"}),
        (MeshSizes(cp=2), PATTERN),
    ],
    ids=str,
)
def test_options(sizes, options):
    found = pool.run(sizes.world_size, hybrids.gradients, sizes, PACKS, options)[0]
    alone = {
        k: v
        for k, v in options.items()
        if k not in ("recompute", "ssm_cp_type", "sequence_parallel", "attention_cp_layout", "cp_comm_type")
    }
    for pack, one, expected in zip(PACKS, found, reference(alone)):
        worst, name = hybrids.difference(one, expected)
        assert worst < 1e-10, (pack, name)


def plans_of_features():
    """The number of plans that two equal layers make for one pack."""
    model, mesh = hybrids.model_of(
        MeshSizes(cp=2), [WHOLE], layer_types=["mamba", "mamba"], recompute="full", ssm_cp_type="a2a"
    )
    with mock.patch.object(FeatureMove, "of", wraps=FeatureMove.of) as planned:
        hybrids.loss_and_gradients(model, mesh, WHOLE)
    return planned.call_count


def test_equal_layers_plan_a_move_of_features_once():
    assert pool.run(2, plans_of_features) == [1, 1]


def a_mixer_alone():
    """The loss of each mixer made by itself, and the message for sizes that do not fit."""
    found = []
    parallel_state.initialize_model_parallel()
    for mixer, options in ((MambaMixer, {"mamba_num_groups": 2, "mamba_head_dim": 8}), (GatedDeltaMixer, {})):
        config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2, **options)
        alone = mixer(config)
        x = torch.randn(5, 2, 16)
        rows = make_rows(config, process_groups(), x)
        found.append(tuple(alone(x, rows).shape))
    with pytest.raises(ValueError, match="mamba_num_heads 3 is not divisible by mamba_num_groups 2"):
        MambaMixer(dataclasses.replace(config, mamba_num_heads=3, mamba_num_groups=2))
    parallel_state.destroy_model_parallel()
    return found


def test_a_mixer_can_be_used_alone():
    assert pool.run(1, a_mixer_alone)[0] == [(5, 2, 16)] * 2
