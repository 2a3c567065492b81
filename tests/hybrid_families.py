"""Small hybrid models as transformers saves them, of each family that longspan reads and writes."""

import torch

import tiny

SIZES = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
DELTA = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}
MAMBA = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 8,
    "n_groups": 2,
    "state_size": 6,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
NEMOTRON = {
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 6,
    "rescale_prenorm_residual": False,
}
#: letters of a pattern -> Nemotron-H's list
TYPES = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}

#: name -> (class of transformers, fields of its config)
FAMILIES = {
    "mamba2": ("Mamba2", MAMBA),
    "mamba2, tied, biases": (
        "Mamba2",
        MAMBA
        | dict(
            tie_word_embeddings=True, use_bias=True, use_conv_bias=False, time_step_limit=(0.01, float("inf"))
        ),
    ),
    "qwen3_next": ("Qwen3Next", SIZES | DELTA | EXPERTS | dict(head_dim=16, mlp_only_layers=[1])),
    "qwen3_5_text": ("Qwen3_5Text", SIZES | DELTA | dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3_5_moe_text": ("Qwen3_5MoeText", SIZES | DELTA | EXPERTS | dict(head_dim=16)),
    "olmo_hybrid": ("OlmoHybrid", SIZES | DELTA | dict(rope_theta=None)),
    "olmo_hybrid, rotary": (
        "OlmoHybrid",
        SIZES
        | DELTA
        | dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4}, linear_allow_neg_eigval=False),
    ),
    "nemotron_h": ("NemotronH", SIZES | NEMOTRON | dict(layers_block_type=[TYPES[one] for one in "M-*-M"])),
    "nemotron_h, experts": (
        "NemotronH",
        SIZES
        | NEMOTRON
        | dict(
            layers_block_type=[TYPES[one] for one in "MEM*E-"],
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            moe_shared_expert_intermediate_size=24,
            routed_scaling_factor=2.5,
        ),
    ),
}


def made(name, dtype=torch.float32, **more):
    """A random model of transformers; its norms and biases are other than ones and zeros."""
    import transformers

    kind, fields = FAMILIES[name]
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**(fields | more))
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.3)
    return model.to(dtype)


def save(folder, name, dtype=torch.float32, **more):
    """The folder of such a model, and the model."""
    model = made(name, dtype, **more)
    model.save_pretrained(folder)
    return str(folder), model.eval()
