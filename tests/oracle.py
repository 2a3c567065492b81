"""One-process references in plain PyTorch: nothing is cut, every mask and every position is written out."""

import math

import torch
import torch.nn.functional as F


def plain_llama(weights, tokens, seen, positions, config):
    """The architecture of Llama, with rotary or learned positions, in dense attention.

    Args:
        weights: whole tensors by the names of ``GPTModel``.
        tokens: [s]; seen: bool [s, s], which keys a query sees; positions: [s].
        config: TransformerConfig or Run.transformer_config().

    Returns:
        Logits [s, padded vocabulary].
    """
    d = config.kv_channels
    scale = config.softmax_scale or 1 / d**0.5
    freqs = config.rotary_base ** -(torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = positions[:, None] * freqs
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)

    def rms(x, w):
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + config.layernorm_epsilon) * w

    def turn(x):  # [n, s, d]
        if config.position_embedding_type != "rope":
            return x
        half = d // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    x = weights["embedding.word_embeddings.weight"][tokens]
    if config.position_embedding_type == "learned_absolute":
        x = x + weights["embedding.position_embeddings.weight"][positions]
    for i in range(config.num_layers):
        w = {k.split(f"layers.{i}.")[1]: v for k, v in weights.items() if f"layers.{i}." in k}
        y = rms(x, w["input_layernorm.weight"])
        q, k, v = (
            (y @ w[f"self_attention.linear_{name}.weight"].T).view(len(y), -1, d).transpose(0, 1)
            for name in "qkv"
        )
        q, k = turn(q), turn(k)
        k, v = (z.repeat_interleave(q.shape[0] // z.shape[0], 0) for z in (k, v))
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
        o = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(y), -1)
        x = x + o @ w["self_attention.linear_proj.weight"].T
        y = rms(x, w["pre_mlp_layernorm.weight"])
        gate, up = y @ w["mlp.linear_gate.weight"].T, y @ w["mlp.linear_up.weight"].T
        x = x + (F.silu(gate) * up) @ w["mlp.linear_down.weight"].T
    return rms(x, weights["decoder.final_layernorm.weight"]) @ weights["output_layer.weight"].T


def dense(q, k, v, cu_seqlens, causal=True, window=None, scale=None, sinks=None):
    """Attention in one dense masked softmax: q [t, n, d], k and v [t, m, d]. Returns out, lse [n, t].

    A sink of each head (sinks [n]) is one more column of scores, of a key whose value is 0.
    """
    t, n, d = q.shape
    k, v = (x.repeat_interleave(n // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("snd,tnd->nst", q, k) * (scale or 1 / math.sqrt(d))
    document = torch.bucketize(torch.arange(t), torch.tensor(cu_seqlens[1:]), right=True)
    seen = document[:, None] == document[None, :]
    if causal:
        seen &= torch.arange(t)[:, None] >= torch.arange(t)[None, :]
    if window is not None:
        seen &= torch.arange(t)[:, None] - torch.arange(t)[None, :] < window
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(n, 1, 1).expand(n, t, 1)], dim=-1)
    return torch.einsum("nst,tnd->snd", scores.softmax(-1)[..., :t], v), scores.logsumexp(-1)


def inputs(t, n, m, d, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, dout = (torch.randn(t, n, d, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    k, v = (torch.randn(t, m, d, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    return q, k, v, dout


def sinks_of(n):
    """A sink for each of n heads: most of them about as large as a row's lse, one of no effect."""
    sinks = torch.linspace(-1.0, 5.0, n, dtype=torch.float64)
    sinks[0] = float("-inf")
    return sinks
