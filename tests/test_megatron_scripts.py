"""longspan.initialize with its arguments and refusals, and the scripts of examples/megatron_scripts on real
processes."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader

import longspan
import pool
from longspan import UserError, parallel_state
from longspan.tensor_parallel import ColumnParallelLinear

SCRIPTS = Path(__file__).parents[1] / "examples" / "megatron_scripts"
MODEL = ["--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4"]


# --- arguments -------------------------------------------------------------------------------


def add_arguments(parser):
    group = parser.add_argument_group("own")
    group.add_argument("--alpha", type=float, default=0.5)
    group.add_argument("--names", nargs="+", default=[])
    group.add_argument("--num-workers", type=int, default=0)  # a flag without effect in longspan's own runs
    return parser


def read(argv, defaults=None, provider=add_arguments):
    """The arguments as a dict, the groups' sizes, and what was printed to stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        args = longspan.initialize(provider, defaults, argv)
    assert longspan.get_args() is args
    assert longspan.get_timers().log_level == args.timing_log_level
    sizes = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size(),
    )
    weight = ColumnParallelLinear(8, 8, longspan.TransformerConfig(**SMALL)).weight.full_tensor().detach()
    return vars(args), sizes, err.getvalue(), weight


SMALL = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1}


def test_arguments_have_megatrons_names_and_groups_are_made():
    flags = [*MODEL, "--tensor-model-parallel-size", "2", "--context-parallel-size=2", "--sequence-parallel"]
    flags += ["--alpha", "2", "--seq-length", "64", "--global-batch-size", "6", "--train-iters", "7"]
    flags += ["--names", "a", "b", "--lr", "3e-4", "--use-flash-attn", "--timing-log-level", "1", "--bf16"]
    flags += ["--num-workers", "3", "--untie-embeddings-and-output-weights", "--eval-iters", "5"]
    results = pool.run(4, read, flags)
    for rank, (args, sizes, printed, weight) in enumerate(results):
        assert sizes == (2, 2, 1, 1, None)
        expected = {
            **{"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 128},
            **{"kv_channels": 8, "num_query_groups": 4, "seq_length": 64, "sequence_len": 64},
            **{"micro_batch_size": 1, "global_batch_size": 6, "gradient_accumulation_steps": 6},
            **{"train_iters": 7, "max_steps": 7, "lr": 3e-4, "learning_rate": 3e-4, "min_lr": 0.0},
            **{"tensor_model_parallel_size": 2, "context_parallel_size": 2, "sequence_parallel": True},
            **{"pipeline_model_parallel_size": 1, "virtual_pipeline_model_parallel_size": None},
            **{"world_size": 4, "data_parallel_size": 1, "rank": rank, "cp_comm_type": "p2p"},
            **{"alpha": 2.0, "names": ["a", "b"], "num_workers": 3, "timing_log_level": 1},
            **{
                "timing_log_option": "minmax",
                "barrier_with_L1_time": True,
                "seed": 1234,
                "log_interval": 100,
            },
            **{"bf16": True, "fp16": False, "params_dtype": torch.bfloat16, "swiglu": False, "save": None},
            **{"untie_embeddings_and_output_weights": True, "optimizer": "adam", "eval_iters": 5},
            **{"recompute_granularity": None, "mock_data": True, "clip_grad": 1.0, "weight_decay": 0.01},
        }
        assert {name: args[name] for name in expected} == expected
        # Notes are printed once.
        assert ("--use-flash-attn" in printed) == (rank == 0)
        assert "--num-workers" not in printed
        assert torch.equal(weight, results[0][3]), "the seed is set on all ranks"


def test_defaults_of_a_script_hold_where_no_flag_is_given():
    defaults = {"seq_length": 32, "bf16": True, "lr": 1.0, "swiglu": True, "alpha": 9.0, "names": ["z"]}
    defaults |= {"untie_embeddings_and_output_weights": True, "timing_log_option": "all", "save": None}
    args = pool.run(1, read, [*MODEL, "--lr", "0.5", "--names", "b"], defaults)[0][0]
    assert (args["seq_length"], args["bf16"], args["lr"], args["swiglu"]) == (32, True, 0.5, True)
    assert (args["alpha"], args["names"], args["timing_log_option"]) == (9.0, ["b"], "all")
    assert args["untie_embeddings_and_output_weights"] is True
    assert args["save"] is None


def test_stages_of_a_pipeline():
    flags = [*MODEL, "--num-layers", "4", "--pipeline-model-parallel-size", "2", "--global-batch-size", "4"]
    args, sizes, *_ = pool.run(2, read, [*flags, "--num-virtual-stages-per-pipeline-rank", "2"])[1]
    assert sizes == (1, 1, 1, 2, 2)
    assert args["virtual_pipeline_model_parallel_size"] == 2


def pipeline_group(flags):
    longspan.initialize(argv=[*MODEL, *flags])
    return dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())


def test_the_other_order_of_the_ranks():
    flags = ["--num-layers", "4", "--pipeline-model-parallel-size", "2", "--global-batch-size", "4"]
    assert pool.run(4, pipeline_group, flags) == [[0, 2], [1, 3], [0, 2], [1, 3]]
    flags.append("--use-tp-pp-dp-mapping")
    assert pool.run(4, pipeline_group, flags) == [[0, 1], [0, 1], [2, 3], [2, 3]]


def refusals(cases):
    """The problems of each (flags, defaults); nothing is installed after a refusal, and a right call works
    then."""
    found = []
    for flags, defaults in cases:
        with pytest.raises(UserError) as error:
            longspan.initialize(add_arguments, defaults, flags)
        found.append(error.value.problems)
        assert not parallel_state.model_parallel_is_initialized()
    args = longspan.initialize(add_arguments, None, [])
    with pytest.raises(AttributeError, match=r"args\.seq_len: unknown argument\. Did you mean seq_length\?"):
        args.seq_len  # noqa: B018
    with pytest.raises(AttributeError, match="extra_args_provider"):
        args.use_flash_attn  # noqa: B018
    assert getattr(args, "something_else", 1) == 1
    with pytest.raises(RuntimeError, match="already initialised"):
        longspan.initialize(add_arguments, None, [])
    return found


def test_mistakes_come_together_in_the_words_of_flags():
    many = ["--context-parallel-sise", "2", "--tensor-model-parallel-size", "2", "--alpha", "x", "--lr", "y"]
    cases = [
        (many, None),
        (["--hidden-size", "8"], {"sequence_length": 3}),
        (["--timing-log-level", "4", "--num-layers", "2", "--fp16"], None),
        ([*MODEL, "--min-lr", "2", "--lr", "1", "stray"], None),
        ([*MODEL, "--global-batch-size", "3", "--micro-batch-size", "2"], None),
    ]
    first, second, third, fourth, fifth = pool.run(1, refusals, cases)[0]
    assert [problem.split(":")[0] for problem in first] == [
        "argument --alpha",
        "--context-parallel-sise",
        "--lr 'y' must be a valid number, unable to parse string as a number.",
        "parallel sizes",
    ]
    assert "Did you mean --context-parallel-size?" in first[1]
    assert "tp 2 x cp 1 x dp_shard 1 x dp_replicate 1 x pp 1 = 2, but there are 1 processes" in first[3]
    assert "args_defaults 'sequence_length': unknown argument. Did you mean " in second[0]
    assert second[1].startswith("--num-layers, --num-attention-heads: missing.")
    assert third[0].startswith("argument --timing-log-level: invalid choice: 4")
    assert third[1].startswith("--fp16")
    assert fourth[0].startswith("'stray': unexpected argument")
    assert "--min-lr" in fourth[1]
    assert fifth == [
        "--global-batch-size 3 is not a multiple of --micro-batch-size 2 x dp 1 = 2 (dp: data parallel ranks). Take one "
        "that is, e.g. --global-batch-size 4."
    ]


def test_a_provider_that_takes_what_is_a_flag_already_is_refused():
    def two(parser):
        parser.add_argument("--seed", type=int)
        parser.add_argument("file")

    with pytest.raises(UserError) as error:
        longspan.initialize(two, None, [])
    assert [problem.split(", which")[0] for problem in error.value.problems] == [
        "extra_args_provider adds --seed",
        "extra_args_provider adds the positional argument 'file'",
    ]
    with pytest.raises(UserError, match="--timing-log-level"):
        longspan.initialize(lambda parser: parser.add_argument("--timing-log-level"), None, [])


def test_nothing_is_there_before_initialize():
    for get in (longspan.get_args, longspan.get_timers):
        with pytest.raises(RuntimeError, match=rf"longspan\.{get.__name__}\(\).*Call longspan\.initialize"):
            get()


# --- the documents' scripts ------------------------------------------------------------------


def run_main(name, *arguments):
    """What ``main`` of a script returns, and what it prints."""
    sys.argv = [name, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        result = runpy.run_path(str(SCRIPTS / name))["main"]()
    return result, out.getvalue()


CUT = ["--tensor-model-parallel-size", "2", "--context-parallel-size", "2", "--sequence-parallel"]


def test_the_training_script_has_one_processes_losses_at_every_layout(tmp_path):
    more = ["--train-iters", "6", "--seq-length", "64", "--log-interval", "3"]
    (expected, printed), *_ = pool.run(1, run_main, "custom_cp_training.py", *more)
    assert expected[-1] < expected[0] - 0.1, "it learns"
    assert printed.count("    step .....") == 2
    assert "forward" not in printed, "level 0 prints whole steps only"
    for flags in (
        [*CUT, "--timing-log-level", "2", "--save", str(tmp_path / "saved")],
        ["--context-parallel-size", "2", "--micro-batch-size", "2"],
    ):
        results = pool.run(4, run_main, "custom_cp_training.py", *more, *flags)
        for losses, _ in results:
            assert losses == pytest.approx(expected, rel=1e-5)
        if "--save" in flags:
            text = results[0][1]
            assert text.count("(min, max) time across ranks (ms):") == 2
            assert "    forward ......" in text
    saved = FileSystemReader(tmp_path / "saved").read_metadata().state_dict_metadata
    assert saved[table_of(saved)].size[0] == 128


def table_of(saved):
    """The name of the table of tokens in a checkpoint; it has 128 rows, of which each tensor parallel rank
    holds 64."""
    return next(name for name in saved if name.startswith("model.embedding.word_embeddings"))


def test_the_minimal_demo_computes_what_one_process_computes():
    for (difference, exact), _ in pool.run(8, run_main, "cp_demo_minimal.py"):
        assert 0 < difference < 1e-5
        assert exact


def test_the_minimal_demo_states_how_many_processes_it_needs():
    with pytest.raises(pool.WorkerError, match="this demo needs 8 processes"):
        pool.run(2, run_main, "cp_demo_minimal.py")


@pytest.mark.parametrize(
    ("processes", "flags"), [(4, CUT), (3, ["--context-parallel-size", "3", "--cp-comm-type", "all_gather"])]
)
def test_verify_cp_passes(processes, flags):
    for errors, _ in pool.run(processes, run_main, "verify_cp.py", *flags):
        assert max(errors.values()) < 1e-10
        assert len(errors) > 20


def test_verify_cp_fails_where_the_reference_differs():
    with pytest.raises(pool.WorkerError, match="SystemExit: 1"):
        pool.run(2, run_main, "verify_cp.py", "--context-parallel-size", "2", "--reference-seed", "7")


def test_profile_cp_measures_and_counts():
    flags = ["--context-parallel-size", "2", "--steps", "2", "--seq-length", "64"]
    (found, printed), _ = pool.run(2, run_main, "profile_cp.py", *flags)
    assert [line.split()[0] for line in printed.splitlines()[1:4]] == ["step", "forward", "backward"]
    assert found["tokens_per_second"] > 0
    assert found["tflops"] > 0
    # zigzag: each rank receives the 16 or 32 rows of the other rank that its own queries see
    assert found["received_bytes"] == 2 * 8 * 16 * 4 * 32
    assert "MiB of keys and values a layer" in printed


def test_check_cp_config_lists_every_rank():
    results = pool.run(4, run_main, "check_cp_config.py", "--context-parallel-size", "2")
    ranks, printed = results[0]
    assert [place["CP group"] for place in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [(place["CP"], place["DP"]) for place in ranks] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert printed.splitlines()[0] == "TP 1 x CP 2 x DP 2 x PP 1 = 4 processes"
    assert all(text == "" for _, text in results[1:])


def python(*arguments):
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)


def test_a_mistake_ends_a_script_without_a_traceback():
    done = python(
        SCRIPTS / "check_cp_config.py", "--context-parallel-size", "2", "--lr-decay-stile", "cosine"
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    one, two = done.stderr.splitlines()
    assert one == "longspan: error: --lr-decay-stile: unknown option. Did you mean --lr-decay-style?"
    assert two.startswith("longspan: error: parallel sizes: tp 1 x cp 2")
    assert "Use a multiple of 2 processes" in two


def test_a_script_runs_under_torchrun():
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", 2)
    done = python(*launcher, SCRIPTS / "check_cp_config.py", "--context-parallel-size", 2)
    assert done.returncode == 0, done.stderr
    assert "rank   1: TP 0, CP 1, DP 0, PP 0, CP group [0, 1]" in done.stdout
