"""Architecture: each field once, with its key and what it decides; a checkpoint's record of it."""

import dataclasses
import json

import pytest

import tiny
from longspan import TransformerConfig
from longspan.config.architecture import Architecture, architecture_problems, key_of
from longspan.config.load import make_config
from longspan.config.schema import TrainConfig
from longspan.training.description import check_fits, config_of_model, describe_model

LEARNED = {"position_embedding_type": "learned_absolute"}


def config(**changes):
    return make_config(tiny.values("data", **changes)).config


def test_every_field_has_a_key_and_decides_something():
    for one in dataclasses.fields(Architecture):
        assert key_of(one) in TrainConfig.model_fields, one.name
        assert one.metadata["decides"] in ("shapes", "numbers", "training"), one.name
        assert one.name in TransformerConfig.__dataclass_fields__
    assert Architecture.of(config(tie_word_embeddings=True)).share_embeddings_and_output_weights


def test_what_is_left_out_is_filled_in():
    model = Architecture.of(config(num_query_groups=None, kv_channels=None, ffn_hidden_size=None))
    assert (model.num_query_groups, model.kv_channels, model.ffn_hidden_size) == (4, 8, 128)
    assert model.max_position_embeddings is None
    assert Architecture.of(config(**LEARNED)).max_position_embeddings == 50  # sequence_len
    assert Architecture.of(config(**LEARNED, max_position_embeddings=64)).max_position_embeddings == 64


def test_all_broken_rules_are_found_at_once():
    model = Architecture(
        num_layers=2, hidden_size=60, num_attention_heads=4, num_query_groups=3, hidden_dropout=0.1
    )
    assert [fields for fields, _ in architecture_problems(model)] == [
        ("num_attention_heads", "num_query_groups"),
        ("kv_channels",),
        ("hidden_dropout",),
    ]
    odd = Architecture(num_layers=2, hidden_size=62, num_attention_heads=4)
    assert "give kv_channels" in architecture_problems(odd)[0][1]


@pytest.mark.parametrize("changes", [{}, LEARNED | {"sliding_window": [None, 8]}], ids=str)
def test_a_checkpoint_records_the_model_by_these_names(changes):
    found = json.loads(json.dumps(describe_model(config(**changes))))
    assert list(found) == ["model", "settings", "init_method_std", "max_position_embeddings"]
    assert set(found["model"]) == {
        *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
        *("ffn_hidden_size", "normalization", "layernorm_zero_centered_gamma", "gated_linear_unit"),
        *("activation_func", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "position_embedding_type"),
        *("vocab_size", "tie_word_embeddings", "num_moe_experts", "model_implementation"),
        *("softmax_type", "qk_layernorm_over_heads", "attention_output_gate", "attention_post_norm"),
        *("layer_types", "hybrid_override_pattern"),
        *(("max_position_embeddings",) if changes else ()),
    }
    assert list(found["settings"]) == [
        *("sequence_len", "sample_packing", "seed", "val_set_size"),
        *("rotary_base", "rotary_percent", "rope_scaling", "sliding_window"),
        *("activation_func_clamp_value", "glu_linear_offset", "layernorm_epsilon", "softmax_scale"),
    ]
    back = config_of_model(found)
    assert Architecture.of(back) == Architecture.of(config(**changes))
    assert (back.vocab_size, back.sequence_len) == (tiny.VOCAB, 50)


def test_a_checkpoint_that_is_older_than_a_field_was_computed_with_its_default(tmp_path):
    now = describe_model(config()) | {"adapter": None, "global_batch_size": 4}
    older = json.loads(json.dumps(now | {"step": 1}))
    del older["settings"]["sliding_window"], older["model"]["add_qkv_bias"]
    (tmp_path / "longspan.json").write_text(json.dumps(older))
    assert check_fits(tmp_path, now, weights_only=False)["step"] == 1
