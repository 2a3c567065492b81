"""A model made in a pipeline by pre_process and post_process alone: layers in equal shares. fp64."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

import pool
from longspan import TransformerConfig, finalize_model_grads, parallel_state
from longspan.context_parallel import get_batch_on_this_cp_rank
from longspan.models import GPTModel, TransformerBlock
from longspan.models.decoder import even_share

VOCAB, LENGTH, SEED = 300, 24, 5
CONFIG = TransformerConfig(
    num_layers=4, hidden_size=32, num_attention_heads=4, params_dtype=torch.float64, init_method_std=0.2
)


def in_a_pipeline(tp, cp, pp):
    """The stages of this rank's pipeline, one after another, against the whole model on the same ranks."""
    parallel_state.initialize_model_parallel(tp, pp, context_parallel_size=cp)
    cut = dataclasses.replace(
        CONFIG, tensor_model_parallel_size=tp, context_parallel_size=cp, sequence_parallel=tp > 1
    )
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    stage = GPTModel(
        dataclasses.replace(cut, pipeline_model_parallel_size=pp), VOCAB, LENGTH, first, last, seed=SEED
    )
    whole = GPTModel(cut, VOCAB, LENGTH, seed=SEED)
    names = {name for name, _ in stage.named_parameters()}
    parts = {name: p for name, p in whole.named_parameters() if name in names}
    assert len(parts) == len(names), "the names are the whole model's"
    for name, parameter in stage.named_parameters():
        assert torch.equal(parameter.to_local(), parts[name].to_local()), name

    generator = torch.Generator().manual_seed(1)
    text = torch.randint(VOCAB, (2, LENGTH + 1), generator=generator)
    batch = get_batch_on_this_cp_rank({"tokens": text[:, :-1], "labels": text[:, 1:]})
    wanted = whole(batch["tokens"], labels=batch["labels"])
    wanted.sum().backward()

    group = parallel_state.get_pipeline_model_parallel_group()
    rank = dist.get_rank(group)
    x = batch["tokens"]
    if not first:
        x = torch.empty(LENGTH // cp // tp, 2, CONFIG.hidden_size, dtype=torch.float64)
        dist.recv(x, group=group, group_src=rank - 1)
        x.requires_grad_()
    out = stage(x, labels=batch["labels"]) if last else stage(x)
    if last:
        torch.testing.assert_close(out, wanted, rtol=1e-12, atol=0)
        out.sum().backward()
    else:
        dist.send(out.detach(), group=group, group_dst=rank + 1)
        gradient = torch.empty_like(out)
        dist.recv(gradient, group=group, group_src=rank + 1)
        out.backward(gradient)
    if not first:
        dist.send(x.grad, group=group, group_dst=rank - 1)
    finalize_model_grads(stage)
    # The whole model was computed by every rank of a pipeline, which none of these sums counts twice.
    finalize_model_grads(whole)
    for name, parameter in stage.named_parameters():
        mine, other = parameter.grad.to_local(), parts[name].grad.to_local()
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12, msg=name)
    return sorted(map(int, stage.decoder.layers))


@pytest.mark.parametrize(("tp", "cp", "pp"), [(1, 1, 4), (2, 1, 2), (1, 2, 2)])
def test_stages_have_the_whole_models_names_weights_and_gradients(tp, cp, pp):
    layers = pool.run(tp * cp * pp, in_a_pipeline, tp, cp, pp)
    share = CONFIG.num_layers // pp
    inner = tp * cp
    assert layers == [list(range(r // inner * share, (r // inner + 1) * share)) for r in range(len(layers))]


def config_of(**fields):
    return dataclasses.replace(CONFIG, pipeline_model_parallel_size=2, **fields)


@pytest.mark.parametrize(
    ("config", "place", "message"),
    [
        (config_of(), (0, 1, True, True), "the installed pipeline group has 1 ranks"),
        (config_of(num_layers=5), (0, 2, True, False), "num_layers=5 does not divide by pipeline_model"),
        (config_of(), (1, 2, True, True), "pre_process=True, post_process=True on pipeline rank 1 of 2"),
        (config_of(), (0, 2, True, True), "post_process=parallel_state.is_pipeline_last_stage"),
        (
            config_of(virtual_pipeline_model_parallel_size=2),
            (0, 2, True, False),
            "virtual_pipeline_model_parallel_size=2",
        ),
    ],
)
def test_what_has_no_equal_shares_is_refused(config, place, message):
    with pytest.raises(ValueError, match=message):
        even_share(config, *place)


def refusals_of_models():
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    last = parallel_state.is_pipeline_last_stage()
    for make in (TransformerBlock, lambda config: GPTModel(config, VOCAB, LENGTH, seed=SEED)):
        with pytest.raises(ValueError, match="pre_process=True, post_process=True on pipeline rank"):
            make(config_of())
    with pytest.raises(ValueError, match=r"Untie them \(share_embeddings_and_output_weights=False\)"):
        GPTModel(config_of(share_embeddings_and_output_weights=True), VOCAB, LENGTH, not last, last)


def test_models_refuse_before_anything_is_sent():
    pool.run(2, refusals_of_models)
