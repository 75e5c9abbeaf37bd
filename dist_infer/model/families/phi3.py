"""Phi-3, Phi-3.5 and Phi-4-mini."""

from __future__ import annotations

from typing import Any

from dist_infer.model.config import ModelConfig
from dist_infer.model.families import split
from dist_infer.model.stored import Stored


def traits(config: Any) -> dict[str, Any]:
    """What sets Phi-3 apart: it is Llama, with a window on every layer where there is one."""
    return {"sliding_windows": (config.sliding_window,) * config.num_hidden_layers if config.sliding_window else ()}


def stored(name: str, config: ModelConfig) -> Stored:
    """Q, K and V are one matrix, and gate and up another, their rows one after another."""
    q, kv, ffn = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.ffn_size
    fused = {
        "self_attn.q_proj": ("self_attn.qkv_proj", q + 2 * kv, 0),
        "self_attn.k_proj": ("self_attn.qkv_proj", q + 2 * kv, q),
        "self_attn.v_proj": ("self_attn.qkv_proj", q + 2 * kv, q + kv),
        "mlp.gate_proj": ("mlp.gate_up_proj", 2 * ffn, 0),
        "mlp.up_proj": ("mlp.gate_up_proj", 2 * ffn, ffn),
    }
    layer, part, kind = split(name)
    if part not in fused:
        return Stored(name)
    whole, rows, offset = fused[part]
    return Stored(f"model.layers.{layer}.{whole}.{kind}", shape=(rows, config.hidden_size), offset=offset)
