"""Qwen2-MoE: Qwen2 whose mlps, or some of them, are mixtures of experts beside one that all tokens share."""

from __future__ import annotations

from typing import Any

from dist_infer.model.config import ExpertsConfig
from dist_infer.model.families import sliding_windows


def traits(config: Any) -> dict[str, Any]:
    """What sets Qwen2-MoE apart: biases of queries, keys and values, experts, and a shared expert behind a gate."""
    experts = ExpertsConfig(
        count=config.num_experts,
        chosen=config.num_experts_per_tok,
        ffn_size=config.moe_intermediate_size,
        layers=experts_layers(config),
        shared_ffn_size=config.shared_expert_intermediate_size,
        shared_gate=True,
        normalized=config.norm_topk_prob,
    )
    return {"qkv_bias": config.qkv_bias, "sliding_windows": sliding_windows(config), "experts": experts}


def experts_layers(config: Any) -> tuple[int, ...]:
    """The layers with experts: each `decoder_sparse_step`-th, less the `mlp_only_layers`."""
    layers = range(config.decoder_sparse_step - 1, config.num_hidden_layers, config.decoder_sparse_step)
    return tuple(layer for layer in layers if layer not in config.mlp_only_layers)
