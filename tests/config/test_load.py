"""Configs: every accepted spelling, and every mistake in one clear message, all at once."""

import json
from typing import get_args

import pytest
import yaml

import tiny
from longspan.config.load import load_config, make_config, to_yaml
from longspan.config.options import Overrides, parse_overrides
from longspan.config.resolve import resolve
from longspan.config.schema import GROUPS, TrainConfig, keys, names
from longspan.config.yaml_file import read_yaml
from longspan.errors import UserError
from longspan.training.schedule import training_steps, warmup_steps


def problems_of(changes=None, world=None, remove=(), **kwargs):
    values = tiny.values("prefix", **(changes or {}), **kwargs)
    for name in remove:
        del values[name]
    read = make_config(values)
    try:
        resolve(read.config, world, bad_keys=read.bad, earlier=read.problems)
    except UserError as error:
        return error.problems
    return []


def test_every_key_has_a_text_a_group_and_one_flag():
    flags = [k.flag for k in keys()]
    assert len(set(flags)) == len(flags)
    for k in keys():
        assert k.text.endswith((".", ".", "}.")), k.name
        assert k.group in GROUPS
    assert names()["seq_length"] == "sequence_len"
    assert names()["batch_size"] == "global_batch_size"


def test_the_schema_is_valid_json():
    schema = json.loads(json.dumps(TrainConfig.model_json_schema()))
    assert schema["properties"]["sequence_len"]["unit"] == "tokens"
    assert schema["additionalProperties"] is False


def test_an_option_without_a_value_is_told_as_the_key_that_it_sets():
    (problem,) = problems_of({"untie_embeddings_and_output_weights": True})
    assert problem.endswith(
        "unknown key. It is an option without a value; in a file write tie_word_embeddings: false."
    )
    assert problems_of({"no-bf16": True})[0].endswith("in a file write bf16: false.")


@pytest.mark.parametrize(
    ("spelling", "near"),
    [
        ("contxt_parallel_size", "context_parallel_size"),
        ("learning_rat", "learning_rate"),
        ("sequence_length", "sequence_len"),
        ("gradient_acumulation_steps", "gradient_accumulation_steps"),
        ("micro_batchsize", "micro_batch_size"),
    ],
)
def test_an_unknown_key_is_refused_with_the_near_one(spelling, near):
    assert problems_of({spelling: 1}) == [f"{spelling}: unknown key. Did you mean {near}?"]


def test_all_problems_come_at_once():
    found = problems_of(
        {
            "contxt_parallel_size": 2,
            "learning_rate": "fast",
            "tensor_parallel_size": 3,
            "lr_scheduler": "cosin",
            "warmup_steps": 2,
            "warmup_ratio": 0.1,
        },
        world=3,
    )
    assert len(found) == 7
    text = "\n".join(found)
    assert "contxt_parallel_size: unknown key. Did you mean context_parallel_size?" in text
    assert "learning_rate: 'fast' must be a valid number" in text
    assert (
        "lr_scheduler: 'cosin' must be 'cosine', 'linear', 'constant' or 'constant_with_warmup'. Did you mean cosine?"
        in text
    )
    assert "num_attention_heads 4 is not divisible by tensor_parallel_size 3" in text
    assert "num_query_groups 2 (key/value heads) is not divisible by tensor_parallel_size 3" in text
    assert "does not divide 128, the unit the vocabulary is padded to" in text
    assert "warmup_steps and warmup_ratio are both given" in text


@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        (
            {"context_parallel_size": 2, "dp_shard_size": 2},
            6,
            r"tp 1 x cp 2 x dp_shard 2 .* = 4, but there are 6",
        ),
        ({"context_parallel_size": 4}, 6, "Use a multiple of 4 processes"),
        (
            {"num_attention_heads": 6, "num_query_groups": 4, "kv_channels": 8},
            1,
            "6 is not divisible by num_query_groups 4",
        ),
        ({"hidden_size": 33}, 1, "hidden_size 33 is not divisible by num_attention_heads 4"),
        (
            {"global_batch_size": 3},
            2,
            r"global_batch_size 3 is not a multiple of dp 2 .*e.g. global_batch_size 4",
        ),
        (
            {"cp_comm_type": "a2a", "context_parallel_size": 8},
            8,
            r"4 query heads, which do not divide by 8. Use p2p or all_gather, or a2a\+p2p with .* \[2, 4\]",
        ),
        (
            {"cp_comm_type": ["p2p", "a2a+p2p"], "context_parallel_size": 4},
            4,
            r"needs hierarchical_context_parallel_sizes .* 4; found none. For example \[2, 2\]",
        ),
        (
            {"hierarchical_context_parallel_sizes": [2, 3], "context_parallel_size": 4},
            4,
            "product is 6, context_parallel_size is 4",
        ),
        ({"hybrid_context_parallel": True}, 1, "needs max_seqlen_per_dp_cp_rank"),
        ({"max_seqlen_per_dp_cp_rank": 64}, 1, "no effect without hybrid_context_parallel"),
        (
            {"hierarchical_context_parallel_sizes": [2, 1], "context_parallel_size": 2},
            2,
            r"no effect without cp_comm_type: a2a\+p2p",
        ),
        (
            {"hybrid_context_parallel": True, "max_seqlen_per_dp_cp_rank": 64, "cp_comm_type": "a2a"},
            1,
            "'a2a' with hybrid_context_parallel: .* Use p2p or all_gather",
        ),
        (
            {"hybrid_context_parallel": True, "max_seqlen_per_dp_cp_rank": 64, "cp_layout": "zigzag"},
            1,
            "cp_layout 'zigzag' with hybrid_context_parallel",
        ),
        ({"sliding_window": [3, 5], "export_hf": True}, 1, "has no Hugging Face architecture"),
        ({"sliding_window": [0, 5]}, 1, r"sliding_window \[0, 5\]: tokens a query sees, itself included"),
        ({"cp_comm_type": "p2q", "context_parallel_size": 2}, 2, "'p2q'.*Did you mean p2p"),
        ({"eval_steps": 5, "val_set_size": 0}, 1, "val_set_size is 0"),
        ({"bf16": True}, 1, "bf16: true with params_dtype: float64"),
        ({"sequence_parallel": True}, 1, "has no effect"),
        ({"rope_scaling": {"rope_type": "yarm"}}, 1, "'yarm'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, 1, "low_freq_factor"),
        ({"max_steps": 0}, 1, "max_steps: 0 must be greater than 0"),
        ({"datasets": [{"path": "x", "feild": "y"}]}, 1, "datasets.0.feild: unknown key. Did you mean field"),
        ({"datasets": []}, 1, "datasets: missing"),
        ({"base_model": "nowhere"}, 1, "there is no config.json"),
        ({"batch_size": 8}, 1, "the same key with two values"),
    ],
)
def test_each_broken_rule_names_number_and_remedy(changes, world, message):
    found = problems_of(changes, world)
    assert len([p for p in found if "\n" in p]) == 0
    import re

    assert any(re.search(message, problem) for problem in found), found


def test_missing_keys_are_one_message():
    found = problems_of(remove=["num_layers", "hidden_size", "learning_rate"])
    assert found[0].startswith("num_layers, hidden_size: missing.")
    assert found[1].startswith("learning_rate: missing.")


@pytest.mark.parametrize(
    ("given", "world", "expected"),
    [
        ({}, 1, (1, 1, 1)),
        ({"micro_batch_size": 2, "gradient_accumulation_steps": 3}, 4, (2, 3, 24)),
        ({"global_batch_size": 24}, 4, (1, 6, 24)),
        ({"global_batch_size": 24, "micro_batch_size": 2}, 4, (2, 3, 24)),
        ({"global_batch_size": 24, "gradient_accumulation_steps": 2}, 4, (3, 2, 24)),
        ({"global_batch_size": 24, "gradient_accumulation_steps": 2, "micro_batch_size": 3}, 4, (3, 2, 24)),
    ],
)
def test_any_two_batch_keys_give_the_third(given, world, expected):
    values = tiny.values("prefix")
    del values["global_batch_size"]
    run = resolve(make_config(values | given).config, world)
    assert (run.batch.micro, run.batch.accumulation, run.batch.global_size) == expected


def test_steps_and_warm_up():
    run = tiny.tiny_run("prefix", 1, max_steps=None, num_epochs=2.5)
    assert training_steps(run, 10) == 7  # ceil(10 x 2.5 / 4)
    assert warmup_steps(run.config, 1000) == 30
    assert warmup_steps(run.config, 10000) == 100
    assert warmup_steps(tiny.tiny_run("prefix", 1, warmup_ratio=0.5).config, 10) == 5


def test_overrides_take_both_names_and_read_yaml():
    given = parse_overrides(
        ["c.yaml", "--lr", "1e-4", "--context_parallel_size=2", "--sample-packing", "--no-save-last",
         "--gradient-checkpointing", "selective", "--cp-comm-type", "[p2p, all_gather]",
         "--untie-embeddings-and-output-weights", "--seq-length", "128"]
    )  # fmt: skip
    assert given.problems == given.notes == []
    assert given.rest == ["c.yaml"]
    assert given.values == {
        "learning_rate": "1e-4",
        "context_parallel_size": 2,
        "sample_packing": True,
        "save_last": False,
        "gradient_checkpointing": "selective",
        "cp_comm_type": ["p2p", "all_gather"],
        "tie_word_embeddings": False,
        "sequence_len": 128,
    }


def test_wrong_overrides_come_at_once_with_near_misses():
    mistakes = ["--learning-rat", "1", "--max-steps", "--seed=3", "--num-proceses", "4"]
    assert parse_overrides(mistakes, ["--num-processes"]).problems == [
        "--learning-rat: unknown option. Did you mean --learning-rate?",
        "--max-steps needs a value: Optimizer steps; wins over num_epochs.",
        "--num-proceses: unknown option. Did you mean --num-processes?",
    ]


def test_a_list_takes_several_values_as_megatrons_flags_do():
    given = [
        "--hierarchical-context-parallel-sizes",
        "2",
        "4",
        "--cp-comm-type",
        "p2p",
        "a2a",
        "--sliding-window",
        "8",
        "null",
    ]
    expected = {
        "hierarchical_context_parallel_sizes": [2, 4],
        "cp_comm_type": ["p2p", "a2a"],
        "sliding_window": [8, None],
    }
    assert parse_overrides(given) == Overrides(expected)
    assert parse_overrides(["c.yaml", *given], positionals=1) == Overrides(expected, ["c.yaml"])
    # a config file that comes later is no value
    assert parse_overrides(["--cp-comm-type", "a2a", "c.yaml"], positionals=1) == Overrides(
        {"cp_comm_type": "a2a"}, ["c.yaml"]
    )
    assert parse_overrides(["--cp-comm-type=a2a", "p2p"]).rest == ["p2p"]
    assert parse_overrides(["--seed", "1", "2"]).rest == ["2"]
    # a key that is always a list takes one value as a list of one
    for written in (["[q_proj, v_proj]"], ["q_proj", "v_proj"]):
        given = parse_overrides(["--lora-target-modules", *written]).values
        assert given == {"lora_target_modules": ["q_proj", "v_proj"]}
    one = parse_overrides(["--hierarchical-context-parallel-sizes", "4"])
    assert one.values == {"hierarchical_context_parallel_sizes": [4]}


def test_load_and_write_back(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tiny.values("prefix")))
    config = load_config(path, ["--seed", "7"])
    assert config.seed == 7
    path.write_text(to_yaml(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- a\n- b", "holds list, not a mapping"),
        ("", "holds NoneType"),
        (b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_files_that_are_no_config(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        load_config(path)


def aliases(first, make, count):
    """A mapping in which each key's value is made of an alias to the one before."""
    lines = [f"a0: &a0 {first}", *(f"a{i}: &a{i} {make(f'*a{i - 1}')}" for i in range(1, count))]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (aliases("[x, x]", lambda a: f"[{', '.join([a] * 9)}]", 12), "more than 20,000 values"),
        (aliases("{x: 1}", lambda a: f"{{<<: [{', '.join([a] * 9)}]}}", 12), "more than 20,000 values"),
        (f"a: [{'1, ' * 30_000}]", "more than 20,000 values"),
        (aliases("[x]", lambda a: f"[{a}]", 60), "aliases lead more than 50 deep"),
        ("a: &a [*a]", r"the alias \*a stands inside what it names"),
        ("a: " + "[" * 100_000, "more than 50 deep"),
        ("a: " + "{a: " * 100_000, "more than 50 deep"),
        ("a: " + "9" * 100_000, "a number of 100000 characters"),
        ("a: " + ":".join(["1"] * 100_000), "a number of 199999 characters"),
        ("# more\n" * 200_000, "has 1,400,000 bytes; a config file has 1,048,576 at most"),
    ],
)
def test_a_file_has_limits(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(path)


def test_aliases_and_merges_within_the_limits_are_read(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("a: &a {x: 1, y: [1, 2]}\nb: {<<: *a, x: 2}\nc: [*a, *a]\n")
    own = {"x": 1, "y": [1, 2]}
    assert read_yaml(path) == {"a": own, "b": {"x": 2, "y": [1, 2]}, "c": [own, own]}


def test_a_value_beyond_the_limits_on_the_command_line_is_refused_as_text():
    values = parse_overrides(["--layer-types", "[" * 1000, "--max-steps", "9" * 1000]).values
    assert set(map(type, values.values())) <= {str, list}


def test_thousands_of_unknown_keys_are_told_of():
    problems = make_config({f"learning_rat{i}": 1 for i in range(5000)}).problems
    assert len([p for p in problems if "unknown key" in p]) == 5000
    assert "Did you mean learning_rate" in problems[0]


@pytest.mark.parametrize(
    "values",
    [
        {"output_dir": "a\0b"},
        {"datasets": [{"path": "a\0b"}]},
        {"datasets": [{"path": "a", "roles": {"user\0": ["x"]}}]},
        {"data_path": ["1", "a\0"]},
    ],
)
def test_a_zero_byte_is_refused(values):
    reading = make_config(values)
    assert reading.bad >= values.keys()
    assert "holds a zero byte" in reading.problems[0]


def numeric_keys():
    for k in keys():
        members = (k.annotation, *get_args(k.annotation))
        if int in members or any(get_args(m) == (int,) for m in members):
            yield k.name, int not in members


def test_numbers_beyond_every_machine_are_refused():
    taken = []
    for name, listed in numeric_keys():
        for number in (2**70, -(2**70), "99999999999999999999", "1e30", "1.0e+30", 1e30):
            found = make_config({name: [number] if listed else number}).problems
            if not any(problem.startswith(f"{name}: ") for problem in found):
                taken.append((name, number))
    assert not taken


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("num_layers", 10_000),
        ("hidden_size", 2**20),
        ("sequence_len", 2**30),
        ("sliding_window", 2**30),
        ("context_parallel_size", 2**20),
        ("dataset_num_proc", 4096),
        ("ddp_timeout", 10**9),
        ("max_steps", 2**40),
    ],
)
def test_the_most_of_a_unit(name, most):
    for good in (most, str(most), f"{most}e0"):
        assert not make_config({name: good}).problems
    for bad in (most + 1, str(most + 1), "1e15", "1.0e+15", "99999999999999999"):
        option = parse_overrides([f"--{name.replace('_', '-')}", str(bad)]).values
        for problems in (make_config({name: bad}).problems, make_config({}, option).problems):
            assert any(p.startswith(f"{name}: ") and f"must be at most {most:,} " in p for p in problems)


@pytest.mark.parametrize("name", ["datasets", "test_datasets"])
def test_an_empty_path_is_not_the_current_folder(name):
    for wrong in (
        {"path": ""},
        {"path": " "},
        {"path": "x", "data_files": ""},
        {"path": "x", "data_files": ["a", ""]},
    ):
        assert any("must not be empty" in p for p in make_config({name: [wrong]}).problems)
    assert not make_config({name: [{"path": ".", "data_files": ["a"]}]}).problems


LENIENT = """
wandb_name: 2024-01-01
wandb_project: 007
wandb_entity: 2024_01
wandb_mode: off
adapter: false
lora_model_dir: ''
lora_target_modules: []
fsdp: []
fsdp_config: {}
deepspeed: ''
torch_compile:
plugins:
special_tokens: {}
rope_scaling: false
chat_template: ''
resume_from_checkpoint: no
save_strategy: no
eval_strategy: no
max_steps: 1e3
sequence_len: 1_024
eval_steps: 5e-2
learning_rate: 1e-4
use_wandb: no
gradient_checkpointing: on
datasets: [{path: 2024, name: 1:30}]
"""


def test_values_mean_what_they_obviously_do(tmp_path):
    (tmp_path / "config.yaml").write_text(LENIENT)
    read = make_config(read_yaml(tmp_path / "config.yaml"))
    assert read.problems == []
    config = read.config
    assert (config.wandb_name, config.wandb_project, config.wandb_entity) == ("2024-01-01", "007", "2024_01")
    assert config.wandb_mode == "disabled"
    nothing = "adapter lora_model_dir lora_target_modules special_tokens rope_scaling chat_template resume"
    assert [getattr(config, name) for name in nothing.split()] == [None] * 7
    assert (config.save_last, config.eval_iters) == (False, 0)
    assert (config.max_steps, config.sequence_len) == (1000, 1024)
    assert (config.eval_steps, config.learning_rate) == (0.05, 1e-4)
    assert (config.use_wandb, config.gradient_checkpointing) == (False, True)
    assert (config.datasets[0].path, config.datasets[0].name) == ("2024", "1:30")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: 0100", "max_steps: '0100' is ambiguous: it can be read as octal and as decimal"),
        ("max_steps: 1:30", "max_steps: '1:30' is ambiguous: it can be read as a number to the base 60"),
        ("ddp_timeout: 1:30.5", "ddp_timeout: '1:30.5' is ambiguous"),
        ("max_steps: 1.5e0", "max_steps: 1.5 must be a valid integer"),
        ("max_steps: yes", "max_steps: True must be a number, not true or false"),
        ("base_model: ''", "base_model: '' must not be empty"),
        ("save_strategy: best", "save_strategy: 'best' is not supported"),
        ("eval_strategy: yes", "eval_strategy: True is not supported"),
        ("fsdp: [full_shard]", "fsdp: ['full_shard'] is not supported"),
    ],
)
def test_values_of_two_meanings_are_refused(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    problems = make_config(read_yaml(tmp_path / "config.yaml")).problems
    assert len(problems) == 1
    assert problems[0].startswith(message)


def test_a_number_of_two_readings_is_refused_as_an_option_too():
    given = parse_overrides(["--max-steps", "0100", "--wandb-name", "0100", "--seed", "0x10"])
    assert given.values == {"max_steps": "0100", "wandb_name": "0100", "seed": 16}
    problem = make_config({}, given.values).problems[0]
    assert "is ambiguous" in problem
    assert "YAML" not in problem


def test_false_is_nothing_as_an_option_too():
    given = parse_overrides(["--adapter", "false", "--rope-scaling", "false"]).values
    read = make_config({"adapter": "lora"}, given)
    assert read.problems == []
    assert (read.config.adapter, read.config.rope_scaling) == (None, None)
    assert make_config({}, parse_overrides(["--base-model", ""]).values).problems


def test_names_and_texts_in_mappings_are_what_is_written(tmp_path):
    (tmp_path / "config.yaml").write_text("no: 3\nspecial_tokens: {eos_token: 2024-01-01, pad_token: 007}\n")
    read = make_config(read_yaml(tmp_path / "config.yaml"))
    assert [p.partition(".")[0] for p in read.problems] == ["no: unknown key"]
    assert read.config.special_tokens == {"eos_token": "2024-01-01", "pad_token": "007"}


def test_a_missing_file_names_the_near_one(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match=r"does not exist. Did you mean config.yaml\?"):
        load_config(tmp_path / "confg.yaml")


def test_architecture_from_a_model_folder(tmp_path):
    base = {"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 1000, "rms_norm_eps": 1e-6,
            "rope_theta": 500000.0, "tie_word_embeddings": True}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(base))
    values = tiny.values("prefix", base_model=str(tmp_path), reinit_weights=True)
    for name in ("hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size"):
        del values[name]
    read = make_config(values)
    assert not read.problems
    model = resolve(read.config, 1).transformer_config()
    assert (model.num_layers, model.hidden_size, model.num_query_groups) == (
        2,
        64,
        2,
    )  # the file's own key wins
    assert (model.rotary_base, model.layernorm_epsilon) == (500000.0, 1e-6)
    assert model.share_embeddings_and_output_weights
