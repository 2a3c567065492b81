"""Small Llamas as transformers saves them, adapters as PEFT does, and runs that start from both."""

from pathlib import Path

import torch
import torch.distributed as dist

import tiny
from longspan.config.lora import TARGETS
from longspan.context_parallel import SequenceLayout
from longspan.training.export import export
from longspan.training.trainer import Trainer

LORA = {"adapter": "lora", "lora_r": 3, "lora_alpha": 7.5, "lora_target_linear": True}


#: tokens of a row; no degree of parallelism divides it evenly
ROWS = 45
#: a small model: grouped heads, a vocabulary that is no multiple of 128
SHAPE = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
#: the keys of a config that describe this architecture
OWN = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "ffn_hidden_size",
    "vocab_size",
)


def make_llama(folder, tied=False, dtype=torch.float32, seed=1, kind="Llama", max_shard_size="1GB", **fields):
    """A random Llama of SHAPE, or another kind with the same names, as transformers saves it.

    Args:
        fields: of its config, beside those of SHAPE or in their place.
    """
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**SHAPE | {"tie_word_embeddings": tied} | fields)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return str(folder)


def make_adapters(base, folder, targets=TARGETS, rank=3, alpha=7.5, rslora=False, seed=2):
    """Adapters that change something (B is random too), as PEFT saves them."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets),
        use_rslora=rslora,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return str(folder)


def from_base(base, **more):
    """Changes of ``tiny.values``: the architecture is base_model's alone."""
    return {name: None for name in (*OWN, "init_method_std")} | {"base_model": base} | more


def base_run(prefix, base, **more):
    """A run that starts from ``base``, over all ranks of this world."""
    return tiny.tiny_run(prefix, dist.get_world_size(), **from_base(base, **more))


def lora_run(prefix, base, **more):
    return base_run(prefix, base, **LORA | more)


def row_of_tokens(length=ROWS):
    """Tokens [1, length]."""
    return torch.arange(length).view(1, length) * 7 % tiny.VOCAB


def whole_logits(trainer, tokens):
    """The logits [1, s, v] of tokens [1, s], computed by all ranks of the run and whole on each. Collective."""
    sizes = trainer.run.sizes
    cut = SequenceLayout.contiguous if trainer.model.config.recurrent else SequenceLayout.zigzag
    layout = cut(tokens.shape[1], sizes.cp, multiple_of=sizes.tp)
    trainer.model.parallel_output = False
    with torch.no_grad():
        local = trainer.model(layout.shard(tokens, trainer.shard.cp_rank, dim=1), layout=layout)
    return layout.unshard(local, trainer.groups.cp, dim=1)


def imported(prefix, base, folder, more):
    """Logits of the imported model for ``row_of_tokens()`` at this layout; then its export."""
    trainer = Trainer(base_run(prefix, base, **more), torch.device("cpu"))
    logits = whole_logits(trainer, row_of_tokens())
    export(trainer, Path(folder))
    return logits
