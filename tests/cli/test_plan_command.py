"""longspan plan: whether a run fits, from its config alone."""

import json

import pytest

import command

SMALL = """
num_layers: 2
hidden_size: 64
num_attention_heads: 4
ffn_hidden_size: 128
vocab_size: 512
sequence_len: 128
micro_batch_size: 1
mock_data: true
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(SMALL)
    return path


def test_a_plan_says_what_a_run_needs(config, tmp_path):
    arguments = ["plan", str(config), "--gpus", "8", "--context-parallel-size", "2", "--gpu", "a100"]
    done = command.run(*arguments, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["fits"]
    assert plan["mesh"] == "tp 1 x cp 2 x dp_shard 4 x dp_replicate 1 x pp 1 = 8"
    memory = plan["memory_gib"]
    parts = sum(size for name, size in memory.items() if name not in ("total", "lightest"))
    assert memory["total"] == pytest.approx(parts) == pytest.approx(memory["lightest"])
    assert plan["step_s"] == pytest.approx(sum(plan["time_s"].values()))
    tokens = 4 * 128
    assert plan["tokens_per_second_per_gpu"] == pytest.approx(tokens / plan["step_s"] / 8)
    # Four weights of attention a layer, three of the MLP, and the output; twelve for each of the pairs up to the diagonal
    flops = 6 * tokens * (2 * (4 * 64 * 64 + 3 * 64 * 128) + 64 * 512 + 2 * 2 * 64)
    flops += 12 * 4 * (128 * 129 / 2) * 2 * 64
    assert plan["tflops_per_gpu"] * 1e12 * plan["step_s"] * 8 == pytest.approx(flops, rel=1e-3)
    assert list(tmp_path.iterdir()) == [config], "nothing is written"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h10"], ["--gpu h10", "h100"]),
        (["--gpus", "6", "--nodes", "4"], ["--gpus 6 --nodes 4"]),
        (["--gpus", "3", "--context-parallel-size", "2"], ["3"]),
        (["--num-attention-heads", "4", "--tensor-parallel-size", "8"], ["num_attention_heads", "8"]),
        (["--document-len", "0"], ["--document-len"]),
    ],
)
def test_a_mistake_is_one_message(config, tmp_path, arguments, words):
    done = command.run("plan", str(config), *arguments, cwd=tmp_path)
    assert done.returncode == 2 or done.returncode == 1
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_what_does_not_fit_is_said_by_the_exit_code(config, tmp_path):
    big = ["--vocab-size", "128000", "--hidden-size", "16384", "--gpu", "l40s"]
    done = command.run("plan", str(config), *big, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "It does not fit in the 44.7 GiB of L40S 48 GB." in done.stdout
