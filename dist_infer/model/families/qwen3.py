"""Qwen3 (dense)."""

from __future__ import annotations

from typing import Any

from dist_infer.model.families import sliding_windows


def traits(config: Any) -> dict[str, Any]:
    """What sets Qwen3 apart: queries and keys are normalized for each head before the rotation."""
    return {
        "qkv_bias": config.attention_bias,
        "output_bias": config.attention_bias,
        "qk_norm": "head",
        "sliding_windows": sliding_windows(config),
    }
