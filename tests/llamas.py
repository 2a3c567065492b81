"""Small Llamas as transformers saves them, adapters as PEFT does, and runs that start from both."""

import torch
import torch.distributed as dist

import tiny
from longspan.config.lora import TARGETS

LORA = {"adapter": "lora", "lora_r": 3, "lora_alpha": 7.5, "lora_target_linear": True}


def make_llama(folder, tied=False, dtype=torch.float32, seed=1, **sizes):
    """A random Llama: grouped heads, a vocabulary that is no multiple of 128."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    fields = {
        "vocab_size": tiny.VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
    }
    LlamaForCausalLM(LlamaConfig(**fields | sizes)).to(dtype).save_pretrained(folder)
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


def changes(base, **more):
    """A config that takes its architecture from base_model alone."""
    own = (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "ffn_hidden_size",
        "vocab_size",
    )
    return {name: None for name in (*own, "init_method_std")} | {"base_model": base} | LORA | more


def lora_run(prefix, base, **more):
    return tiny.tiny_run(prefix, dist.get_world_size(), **changes(base, **more))
