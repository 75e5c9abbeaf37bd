"""Granite 3 (dense)."""

from __future__ import annotations

from typing import Any


def traits(config: Any) -> dict[str, Any]:
    """What sets Granite apart from Llama: factors on embeddings, attention scores, branches and logits."""
    return {
        "qkv_bias": config.attention_bias,
        "output_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "attention_scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": 1 / config.logits_scaling,
    }
