"""Gemma 2."""

from __future__ import annotations

from typing import Any

from dist_infer.model.families import sliding_windows


def traits(config: Any) -> dict[str, Any]:
    """What sets Gemma 2 apart: norms on both sides of every branch, softcaps, scaled embeddings, windows on every other layer."""
    return {
        "qkv_bias": config.attention_bias,
        "output_bias": config.attention_bias,
        "norm": "rms_unit",
        "norm_placement": "both",
        "activation": config.hidden_activation,
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        "attention_softcap": config.attn_logit_softcapping,
        "logit_softcap": config.final_logit_softcapping,
        "embedding_scale": config.hidden_size**0.5,
        "sliding_windows": sliding_windows(config),
    }
