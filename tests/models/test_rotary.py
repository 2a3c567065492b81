"""Scaled rotary embeddings against transformers' own functions, and what is refused."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan import TransformerConfig
from longspan.config.rope import rope_problems
from longspan.models.rotary import at_length, attention_factor, frequencies, rotary_table

HEAD = 32


def config(scaling, base=10000.0, head=HEAD, **more):
    return TransformerConfig(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=2,
        kv_channels=head,
        rotary_base=base,
        rope_scaling=scaling,
        **more,
    )


def theirs(scaling, base, head, longest, length=None):
    """(frequencies, attention factor) as transformers computes them."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    them = LlamaConfig(
        hidden_size=2 * head,
        num_attention_heads=2,
        head_dim=head,
        max_position_embeddings=longest,
        rope_parameters={"rope_theta": base, **scaling},
    )
    kind = scaling["rope_type"]
    return ROPE_INIT_FUNCTIONS[kind](them, "cpu", seq_len=length)


def check(scaling, base, head, longest, length=None):
    ours = config(scaling, base, head, max_position_embeddings=longest)
    ours = at_length(ours, length or longest)
    got = frequencies(head, ours.rotary_base, ours.rope_scaling)
    expected, factor = theirs(scaling, base, head, longest, length)
    torch.testing.assert_close(got, expected.double(), rtol=2e-5, atol=1e-6)
    assert attention_factor(scaling) == pytest.approx(factor, rel=1e-6)


heads = st.sampled_from([8, 32, 64, 128])
bases = st.sampled_from([1e4, 5e5, 1e6])
factors = st.floats(1, 64)


@settings(max_examples=60, deadline=None)
@given(
    heads,
    bases,
    factors,
    st.integers(5, 15),
    st.fixed_dictionaries(
        {},
        optional={
            "beta_fast": st.floats(8, 64),
            "beta_slow": st.floats(0.5, 8),
            "truncate": st.booleans(),
            "attention_factor": st.floats(0.1, 3),
        },
    ),
)
def test_yarn(head, base, factor, power, more):
    original = 2**power
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        **more,
    }
    check(scaling, base, head, int(original * factor))


@pytest.mark.parametrize("mscale", [(1.0, 0.707), (0.707, 0.707), (1.0, 1.0)])
def test_yarn_with_mscale(mscale):
    scaling = {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": mscale[0],
        "mscale_all_dim": mscale[1],
    }
    check(scaling, 1e4, 64, 163840)


@settings(max_examples=30, deadline=None)
@given(heads, bases, factors, st.integers(1, 10000), st.sampled_from([64, 2048, 8192]))
def test_dynamic_at_a_length(head, base, factor, length, longest):
    check({"rope_type": "dynamic", "factor": factor}, base, head, longest, length)


@settings(max_examples=30, deadline=None)
@given(heads, bases, factors, st.floats(0.5, 2), st.floats(2.5, 16), st.sampled_from([64, 2048, 8192]))
def test_llama3_and_linear(head, base, factor, low, high, original):
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    check(scaling, base, head, 131072)
    check({"rope_type": "linear", "factor": factor}, base, head, 131072)


def test_the_attention_factor_scales_cos_and_sin():
    plain = rotary_table(torch.arange(5), frequencies(8, 1e4), torch.float64)
    scaled = rotary_table(torch.arange(5), frequencies(8, 1e4), torch.float64, 1.5)
    assert all(torch.equal(b, 1.5 * a) for a, b in zip(plain, scaled))
    assert attention_factor(None) == attention_factor({"rope_type": "linear", "factor": 8.0}) == 1.0
    assert attention_factor({"rope_type": "yarn", "factor": 8.0}) == 0.1 * math.log(8) + 1


def test_dynamic_needs_a_length():
    with pytest.raises(ValueError, match="Use GPTModel"):
        frequencies(8, 1e4, {"rope_type": "dynamic", "factor": 2.0})


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "longrope", "factor": 4.0}, "two lists of factors.*Use yarn"),
        ({"type": "su", "factor": 4.0}, "'su': one of default, linear, dynamic, yarn, llama3"),
        ({"rope_type": "yarn", "type": "linear", "factor": 2}, "'yarn' and type 'linear' differ"),
        ({"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings missing"),
        (YARN | {"factor": -1}, "factor -1: a number above 0"),
        (YARN | {"beta_fast": 1, "beta_slow": 2}, "beta_fast 1 must not be smaller than beta_slow 2"),
        (YARN | {"mscale": 1.0}, "mscale and mscale_all_dim have an effect together only"),
        (YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.0}, "without effect"),
        (YARN | {"truncate": 1}, "truncate 1: true or false"),
        (YARN | {"rope_theta": 1e4}, "rope_theta would have no effect.*rotary_base"),
        (
            {"rope_type": "linear", "factor": 2, "beta_fast": 3},
            "beta_fast would have no effect; its fields are factor",
        ),
        ({"rope_type": "dynamic", "factor": 2.0}, "needs max_position_embeddings"),
    ],
)
def test_refusals(scaling, words):
    with pytest.raises(ValueError, match=words):
        config(scaling)


def test_scaling_without_rotation_is_refused():
    with pytest.raises(ValueError, match="no effect with position_embedding_type none"):
        config(YARN, position_embedding_type="none")


def test_the_old_name_of_the_type():
    same = SimpleNamespace(
        rope_scaling={"type": "linear", "factor": 2.0},
        rotary_base=1e4,
        kv_channels=8,
        max_position_embeddings=None,
    )
    assert rope_problems(same) == []
    assert torch.equal(frequencies(8, 1e4, same.rope_scaling), frequencies(8, 1e4) / 2)
