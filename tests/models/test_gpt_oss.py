"""gpt-oss in and out against transformers' eager attention: logits, gradients in fp64, and weights in MXFP4."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_families import exactly

import llamas
import pool
import tiny
from llamas import ROWS, row_of_tokens
from longspan.config.architecture import Architecture
from longspan.config.families.config_json import export_problem, hugging_face_config, keys_of
from longspan.config.families.hub import unused_fields
from longspan.config.load import architecture_config
from longspan.context_parallel import SequenceLayout
from longspan.errors import UserError
from longspan.models.hf_weights import FolderWriter, Names, SafetensorsFolder, check_tensors, read_part
from longspan.models.mxfp4 import VALUES, dequantise
from longspan.training.trainer import Trainer

FIELDS = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    # Blocks of MXFP4 have 32 columns.
    "intermediate_size": 64,
    "sliding_window": 7,
    # Small enough for many values here to reach it.
    "swiglu_limit": 0.5,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 32,
    },
}


def load(folder, **more):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager", **more
    )


def make(folder, dtype=torch.float32, **changes):
    """A random model whose biases are random too, and whose sinks are about as large as a row's lse."""
    base = llamas.make_llama(folder, kind="GptOss", **FIELDS | changes)
    model = load(base, dtype=torch.float32)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")):
                parameter.normal_(std=0.5).add_(2.0 * name.endswith("sinks"))
    model.to(dtype).save_pretrained(folder)
    return base


CP2_TP2 = {"tensor_parallel_size": 2, "context_parallel_size": 2}
LAYOUTS = {
    "one": (1, {}),
    "tp2 x cp2": (4, CP2_TP2),
    "ep4 over cp2, a2a": (
        4,
        {"expert_parallel_size": 4, "context_parallel_size": 2, "cp_comm_type": "a2a"},
    ),
}


def test_logits_are_transformers_and_the_round_trip_is_bit_equal(prefix, tmp_path):
    base = make(tmp_path / "base")
    with torch.no_grad():
        expected = load(base)(row_of_tokens()).logits
    theirs = load_file(tmp_path / "base" / "model.safetensors")
    for number, (layout, (world, changes)) in enumerate(LAYOUTS.items()):
        out = tmp_path / str(number)
        logits = pool.run(
            world, llamas.imported, prefix, base, str(out), changes | {"params_dtype": "float32"}
        )[0]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4, msg=lambda m, at=layout: f"{at}: {m}")
        ours = load_file(out / "model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
        with torch.no_grad():
            assert torch.equal(load(out)(row_of_tokens()).logits, expected)


def gradients(prefix, base, folder, more):
    """The loss of the imported model in fp64; its gradients go to a folder, by Hugging Face's names."""
    trainer = Trainer(llamas.base_run(prefix, base, moe_aux_loss_coeff=0.0, **more), torch.device("cpu"))
    sizes, rank = trainer.run.sizes, trainer.shard.cp_rank
    layout = SequenceLayout.zigzag(ROWS, sizes.cp, multiple_of=sizes.tp)
    labels = row_of_tokens().roll(-1, 1)
    out = trainer.model(
        layout.shard(row_of_tokens(), rank, dim=1),
        labels=layout.shard(labels, rank, dim=1, pad_value=-100),
        layout=layout,
    )
    loss = out.sum() / ROWS
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total, group=trainer.groups.dp_cp)
    found = {name: p.grad.full_tensor() for name, p in trainer.model.named_parameters()}
    if dist.get_rank() == 0:
        writer = FolderWriter(Path(folder), Names(trainer.model.config, tiny.VOCAB), None)
        for name, grad in found.items():
            writer.add(name, grad)
        writer.finish({})
    return total.item()


@pytest.mark.parametrize(
    ("world", "cut"),
    [
        (1, {}),
        (2, {"context_parallel_size": 2, "cp_comm_type": "a2a", "gradient_checkpointing": True}),
        (3, {"context_parallel_size": 3}),
        (4, CP2_TP2),
    ],
)
def test_loss_and_gradients_are_those_of_eager_attention(prefix, tmp_path, world, cut):
    base = make(tmp_path / "base", torch.float64)
    loss = pool.run(world, gradients, prefix, base, str(tmp_path / "grads"), cut)[0]
    model = exactly(load(base, dtype=torch.float64))
    rotary = model.model.rotary_emb
    both_halves = rotary.forward
    # This class takes the angles of one half of a head.
    rotary.forward = lambda x, positions: tuple(t.chunk(2, -1)[0] for t in both_halves(x, positions))
    expected = F.cross_entropy(model(row_of_tokens()).logits[0], row_of_tokens().roll(-1, 1)[0])
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    grads = load_file(tmp_path / "grads" / "model.safetensors")
    theirs = {name: p.grad for name, p in model.named_parameters()}
    assert grads.keys() == theirs.keys()
    least = 1e-5 * max(grad.abs().max() for grad in theirs.values())
    for name, ref in theirs.items():
        error = ((grads[name] - ref).abs().max() / ref.abs().max().clamp_min(least)).item()
        assert error <= 1e-10, f"{name}: {error:.1e}"
    assert all(theirs[f"model.layers.{i}.self_attn.sinks"].abs().max() > least for i in range(2))


# --- MXFP4 -------------------------------------------------------------------------------------


def test_values_of_four_bits():
    """Sign, 2 bits of exponent with a bias of 1, and 1 of mantissa; the earlier number in the lower half."""
    for number, value in enumerate(VALUES):
        exponent, mantissa = number >> 1 & 3, number & 1
        size = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
        assert value == (-size if number & 8 else size)
    blocks = torch.zeros(1, 2, 16, dtype=torch.uint8)
    blocks[0, 0, 0], blocks[0, 1, 15] = 0x52, 0xF1
    scales = torch.tensor([[127, 120]], dtype=torch.uint8)
    found = dequantise(blocks, scales)
    assert found.dtype == torch.bfloat16
    assert found.shape == (1, 64)
    assert found[0].nonzero().flatten().tolist() == [0, 1, 62, 63]
    assert found[0, [0, 1, 62, 63]].tolist() == [1.0, 3.0, 0.5 / 128, -6.0 / 128]
    assert dequantise(blocks, torch.full_like(scales, 255)).isnan().all()


def pack(folder, packed):
    """Writes the model of ``folder`` again with MXFP4 experts, and gives ``folder`` the values that these have."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    held = load_file(Path(folder) / "model.safetensors")
    config = json.loads((Path(folder) / "config.json").read_text())
    generator, small = torch.Generator().manual_seed(6), {}
    for name in [n for n in held if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = held[name].shape
        shape = (experts, outputs, inputs // 32)
        blocks = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(121, 126, shape, dtype=torch.uint8, generator=generator)
        small |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        held[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
    save_file(held, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    others = {n: t for n, t in held.items() if f"{n}_blocks" not in small}
    packed.mkdir()
    save_file(others | small, packed / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (packed / "config.json").write_text(json.dumps(config))
    return str(packed)


def test_mxfp4_is_read_and_whole_weights_are_written(prefix, tmp_path):
    base = make(tmp_path / "base", torch.bfloat16)
    packed = pack(base, tmp_path / "packed")
    with torch.no_grad():
        expected = load(base, dtype=torch.float32)(row_of_tokens()).logits
    more = CP2_TP2 | {"expert_parallel_size": 2, "params_dtype": "float32"}
    logits = pool.run(4, llamas.imported, prefix, packed, str(tmp_path / "out"), more)[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in written
    ours, theirs = (load_file(Path(f) / "model.safetensors") for f in (tmp_path / "out", base))
    assert ours.keys() == theirs.keys()
    # The base's dtype is that of what is written.
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    (line,) = unused_fields(packed)
    assert "an export holds whole weights of export_dtype" in line


def test_any_part_of_an_mxfp4_weight_is_read_alone(tmp_path):
    base = make(tmp_path / "base", torch.bfloat16)
    source = SafetensorsFolder(pack(base, tmp_path / "packed"))
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    model = Architecture.of(architecture_config(keys_of(config, "config.json"), 64))
    names = Names(model, tiny.VOCAB, "gpt_oss")
    check_tensors(source, names)
    whole = SafetensorsFolder(base)
    for part in ("gate", "up", "down"):
        name = f"decoder.layers.1.mlp.experts.{part}_weight"
        shape = (4, 32, 64) if part == "down" else (4, 64, 32)
        for ranges in (
            [(0, n) for n in shape],
            [(1, 3), (5, 18), (7, 31)],
            [(3, 4), (0, 1), (0, 32)],
            [(2, 2), (0, 8), (0, 8)],
        ):
            expected = read_part(whole, names, name, shape, ranges)
            assert torch.equal(read_part(source, names, name, shape, ranges), expected)


def test_other_quantised_weights_and_broken_ones_are_refused(tmp_path):
    base = make(tmp_path / "base", torch.bfloat16)
    packed = Path(pack(base, tmp_path / "packed"))
    config = json.loads((packed / "config.json").read_text())
    for method in ("gptq", None):
        with pytest.raises(UserError, match="has a quantization_config"):
            keys_of(config | {"quantization_config": {"quant_method": method}}, "config.json")
    with pytest.raises(UserError, match="has a quantization_config"):
        keys_of(config | {"model_type": "mixtral"}, "config.json")
    with pytest.raises(UserError, match=r"swiglu_alpha 1.5, which is not supported for gpt_oss: only 1.702"):
        keys_of(config | {"swiglu_alpha": 1.5}, "config.json")
    model = Architecture.of(architecture_config(keys_of(config, "config.json"), 64))
    names, held = Names(model, tiny.VOCAB, "gpt_oss"), load_file(packed / "model.safetensors")
    scales = "model.layers.0.mlp.experts.down_proj_scales"
    save_file({n: t for n, t in held.items() if n != scales}, packed / "model.safetensors")
    with pytest.raises(UserError, match=f"{scales} missing"):
        check_tensors(SafetensorsFolder(packed), names)
    save_file(held | {scales: held[scales][:, :, :1].contiguous()}, packed / "model.safetensors")
    name, shape = "decoder.layers.0.mlp.experts.down_weight", (4, 32, 64)
    with pytest.raises(UserError, match=r"the config needs U8 \[4, 32, 2, 16\] and \[4, 32, 2\]"):
        read_part(SafetensorsFolder(packed), names, name, shape, [(0, n) for n in shape])
    save_file(held | {scales: torch.full_like(held[scales], 255)}, packed / "model.safetensors")
    with pytest.raises(UserError, match="holds NaN"):
        read_part(SafetensorsFolder(packed), names, name, shape, [(0, n) for n in shape])


# --- config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"rope_parameters": None}, {"sliding_window": 9, "layer_types": None}]
)
def test_config_json_there_and_back(changes):
    import transformers

    fields = llamas.SHAPE | {"tie_word_embeddings": False} | FIELDS | changes
    theirs = transformers.GptOssConfig(**fields).to_dict()
    given = theirs if changes else {**theirs, "experts_per_token": theirs.pop("num_experts_per_tok")}
    model = Architecture.of(architecture_config(keys_of(given, "config.json"), 64))
    assert model.windows == [fields["sliding_window"], None]
    assert (model.softmax_type, model.moe_router_topk, model.rotary_base) == ("learnable", 2, 150000.0)
    # A file that leaves fields out has transformers' defaults.
    short = {n: v for n, v in fields.items() if v is not None} | {"model_type": "gpt_oss"}
    assert Architecture.of(architecture_config(keys_of(short, "config.json"), 64)) == model
    assert export_problem(model) is None
    written = hugging_face_config(model, vocab_size=97, sequence_len=64, dtype="float32")
    written = json.loads(json.dumps(written))
    assert written["model_type"] == "gpt_oss"
    again = Architecture.of(architecture_config(keys_of(written, "config.json"), 64))
    # YaRN extends a model to this length, which is what a written file names.
    assert dataclasses.replace(again, max_position_embeddings=128) == model
    back = transformers.GptOssConfig(**written).to_dict()
    assert back["rope_parameters"] == theirs["rope_parameters"]
    assert back["layer_types"] == theirs["layer_types"]
    plain = Architecture(**{**vars(model), "softmax_type": "vanilla"})
    assert "softmax_type" in export_problem(plain)
