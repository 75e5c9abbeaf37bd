"""Qwen3-MoE: Qwen3 whose mlps, or some of them, are mixtures of experts."""

from __future__ import annotations

from typing import Any

from dist_infer.model.config import ExpertsConfig
from dist_infer.model.families.qwen2_moe import experts_layers


def traits(config: Any) -> dict[str, Any]:
    """What sets Qwen3-MoE apart: normalized heads, experts, and one sliding window for every layer if it has any."""
    experts = ExpertsConfig(
        count=config.num_experts,
        chosen=config.num_experts_per_tok,
        ffn_size=config.moe_intermediate_size,
        layers=experts_layers(config),
        normalized=config.norm_topk_prob,
    )
    return {
        "qkv_bias": config.attention_bias,
        "output_bias": config.attention_bias,
        "qk_norm": "head",
        "sliding_windows": (config.sliding_window,) * config.num_hidden_layers if config.sliding_window else (),
        "experts": experts,
    }
