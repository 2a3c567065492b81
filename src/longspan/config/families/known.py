"""Architectures of models on the Hugging Face hub, to check a config without weights and without a network.

Each entry holds the relevant fields of the model's ``config.json``. The table lists only models whose numbers
were compared with their published files; any other model works from its own folder.
"""

from __future__ import annotations

from typing import Any


def _shape(
    hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, positions: int
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _llama(*shape: int, theta: float = 10000.0, factor: float | None = None, **more: Any) -> dict[str, Any]:
    scaling = factor and {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    own = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": theta, "rope_scaling": scaling}
    return _shape(*shape) | own | more


def _mistral(vocab: int, theta: float, window: int | None) -> dict[str, Any]:
    own = {"model_type": "mistral", "rms_norm_eps": 1e-5, "rope_theta": theta, "sliding_window": window}
    return _shape(4096, 32, 32, 8, 14336, vocab, 32768) | own


def _qwen2(*shape: int, epsilon: float = 1e-6, tied: bool = False) -> dict[str, Any]:
    own = {"model_type": "qwen2", "rms_norm_eps": epsilon, "rope_theta": 1e6, "tie_word_embeddings": tied}
    return _shape(*shape) | own | {"use_sliding_window": False}


def _qwen3(*shape: int, tied: bool = False) -> dict[str, Any]:
    own = {"model_type": "qwen3", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": tied}
    return _shape(*shape) | own | {"head_dim": 128, "attention_bias": False, "use_sliding_window": False}


def _mixtral(hidden: int, layers: int, heads: int, ffn: int, vocab: int, positions: int) -> dict[str, Any]:
    own = {"model_type": "mixtral", "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001}
    return _shape(hidden, layers, heads, 8, ffn, vocab, positions) | own | experts


def _qwen3_moe(hidden: int, layers: int, heads: int, ffn: int, expert: int) -> dict[str, Any]:
    experts = {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": expert,
        "norm_topk_prob": True,
    }
    more = {"decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001}
    return _qwen3(hidden, layers, heads, 4, ffn, 151936, 40960) | {"model_type": "qwen3_moe"} | experts | more


_LLAMA_2_7B = _llama(4096, 32, 32, 32, 11008, 32000, 4096, torch_dtype="float16")
_LLAMA_2_13B = _llama(5120, 40, 40, 40, 13824, 32000, 4096, torch_dtype="float16")
_LLAMA_2_70B = _llama(8192, 80, 64, 8, 28672, 32000, 4096, torch_dtype="float16")
_LLAMA_3_8B = _llama(4096, 32, 32, 8, 14336, 128256, 8192, theta=5e5)
_LLAMA_3_70B = _llama(8192, 80, 64, 8, 28672, 128256, 8192, theta=5e5)
_LLAMA_31_8B = _llama(4096, 32, 32, 8, 14336, 128256, 131072, theta=5e5, factor=8.0)
_LLAMA_31_70B = _llama(8192, 80, 64, 8, 28672, 128256, 131072, theta=5e5, factor=8.0)
_LLAMA_31_405B = _llama(16384, 126, 128, 8, 53248, 128256, 131072, theta=5e5, factor=8.0)
_LLAMA_32_1B = _llama(2048, 16, 32, 8, 8192, 128256, 131072, theta=5e5, factor=32.0, tie_word_embeddings=True)
_LLAMA_32_3B = _llama(3072, 28, 24, 8, 8192, 128256, 131072, theta=5e5, factor=32.0, tie_word_embeddings=True)
_MISTRAL_01 = _mistral(32000, 1e4, 4096)
_MISTRAL_03 = _mistral(32768, 1e6, None)

#: (architecture, the hub's names of the models that have it); a name with {} is two names: without an ending,
#: and with the ending of the instruction-tuned model
_PLACES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    (
        _LLAMA_2_7B,
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf", "NousResearch/Llama-2-7b-hf"),
    ),
    (
        _LLAMA_2_13B,
        ("meta-llama/Llama-2-13b-hf", "meta-llama/Llama-2-13b-chat-hf", "NousResearch/Llama-2-13b-hf"),
    ),
    (
        _LLAMA_2_70B,
        ("meta-llama/Llama-2-70b-hf", "meta-llama/Llama-2-70b-chat-hf", "NousResearch/Llama-2-70b-hf"),
    ),
    (_LLAMA_3_8B, ("meta-llama/Meta-Llama-3-8B{}", "NousResearch/Meta-Llama-3-8B{}")),
    (_LLAMA_3_70B, ("meta-llama/Meta-Llama-3-70B{}", "NousResearch/Meta-Llama-3-70B{}")),
    (
        _LLAMA_31_8B,
        (
            "meta-llama/Llama-3.1-8B{}",
            "meta-llama/Meta-Llama-3.1-8B{}",
            "NousResearch/Meta-Llama-3.1-8B{}",
            "unsloth/Meta-Llama-3.1-8B{}",
        ),
    ),
    (
        _LLAMA_31_70B,
        (
            "meta-llama/Llama-3.1-70B{}",
            "meta-llama/Meta-Llama-3.1-70B{}",
            "meta-llama/Llama-3.3-70B-Instruct",
        ),
    ),
    (_LLAMA_31_405B, ("meta-llama/Llama-3.1-405B{}", "meta-llama/Meta-Llama-3.1-405B{}")),
    (_LLAMA_32_1B, ("meta-llama/Llama-3.2-1B{}", "NousResearch/Llama-3.2-1B", "unsloth/Llama-3.2-1B{}")),
    (_LLAMA_32_3B, ("meta-llama/Llama-3.2-3B{}", "unsloth/Llama-3.2-3B{}")),
    (_MISTRAL_01, ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.1")),
    (_mistral(32000, 1e6, None), ("mistralai/Mistral-7B-Instruct-v0.2",)),
    (_MISTRAL_03, ("mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-Instruct-v0.3")),
    (_qwen2(896, 24, 14, 2, 4864, 151936, 131072, tied=True), ("Qwen/Qwen2-0.5B",)),
    (_qwen2(1536, 28, 12, 2, 8960, 151936, 131072, tied=True), ("Qwen/Qwen2-1.5B", "Qwen/Qwen2.5-1.5B")),
    (_qwen2(3584, 28, 28, 4, 18944, 152064, 131072), ("Qwen/Qwen2-7B", "Qwen/Qwen2.5-7B")),
    (
        _qwen2(896, 24, 14, 2, 4864, 151936, 32768, tied=True),
        ("Qwen/Qwen2-0.5B-Instruct", "Qwen/Qwen2.5-0.5B{}"),
    ),
    (
        _qwen2(1536, 28, 12, 2, 8960, 151936, 32768, tied=True),
        ("Qwen/Qwen2-1.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"),
    ),
    (_qwen2(2048, 36, 16, 2, 11008, 151936, 32768, tied=True), ("Qwen/Qwen2.5-3B{}",)),
    (
        _qwen2(3584, 28, 28, 4, 18944, 152064, 32768),
        ("Qwen/Qwen2-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
    ),
    (_qwen2(5120, 48, 40, 8, 13824, 152064, 131072, epsilon=1e-5), ("Qwen/Qwen2.5-14B",)),
    (_qwen2(5120, 48, 40, 8, 13824, 152064, 32768), ("Qwen/Qwen2.5-14B-Instruct",)),
    (_qwen2(5120, 64, 40, 8, 27648, 152064, 131072, epsilon=1e-5), ("Qwen/Qwen2.5-32B",)),
    (_qwen2(5120, 64, 40, 8, 27648, 152064, 32768), ("Qwen/Qwen2.5-32B-Instruct",)),
    (_qwen2(8192, 80, 64, 8, 29568, 152064, 131072, epsilon=1e-5), ("Qwen/Qwen2.5-72B",)),
    (_qwen2(8192, 80, 64, 8, 29568, 152064, 32768), ("Qwen/Qwen2.5-72B-Instruct",)),
    (_qwen3(1024, 28, 16, 8, 3072, 151936, 40960, tied=True), ("Qwen/Qwen3-0.6B",)),
    (_qwen3(2048, 28, 16, 8, 6144, 151936, 40960, tied=True), ("Qwen/Qwen3-1.7B",)),
    (_qwen3(2560, 36, 32, 8, 9728, 151936, 40960, tied=True), ("Qwen/Qwen3-4B",)),
    (_qwen3(4096, 36, 32, 8, 12288, 151936, 40960), ("Qwen/Qwen3-8B",)),
    (_qwen3(5120, 40, 40, 8, 17408, 151936, 40960), ("Qwen/Qwen3-14B",)),
    (_qwen3(5120, 64, 64, 8, 25600, 151936, 40960), ("Qwen/Qwen3-32B",)),
    (
        _mixtral(4096, 32, 32, 14336, 32000, 32768),
        ("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
    ),
    (_mixtral(6144, 56, 48, 16384, 32000, 65536), ("mistralai/Mixtral-8x22B-v0.1",)),
    (_mixtral(6144, 56, 48, 16384, 32768, 65536), ("mistralai/Mixtral-8x22B-Instruct-v0.1",)),
    (_qwen3_moe(2048, 48, 32, 6144, 768), ("Qwen/Qwen3-30B-A3B",)),
    (_qwen3_moe(4096, 94, 64, 12288, 1536), ("Qwen/Qwen3-235B-A22B",)),
    (
        _llama(
            *(576, 30, 9, 3, 1536, 49152, 8192),
            theta=1e5,
            tie_word_embeddings=True,
            initializer_range=1 / 24,
        ),
        ("HuggingFaceTB/SmolLM2-135M",),
    ),
    (
        _llama(2048, 24, 32, 32, 8192, 49152, 8192, theta=1.3e5, tie_word_embeddings=True),
        ("HuggingFaceTB/SmolLM2-1.7B{}",),
    ),
]

KNOWN_MODELS: dict[str, dict[str, Any]] = {
    place.format(ending): architecture
    for architecture, places in _PLACES
    for place in places
    for ending in (("", "-Instruct") if "{}" in place else ("",))
}


def known_model(name: str) -> dict[str, Any] | None:
    """The architecture's fields in the ``config.json`` of a model on the hub; None if not in the table."""
    found = KNOWN_MODELS.get(name)
    return dict(found) if found is not None else None
