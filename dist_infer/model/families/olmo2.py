"""OLMo 2."""

from __future__ import annotations

from typing import Any


def traits(config: Any) -> dict[str, Any]:
    """What sets OLMo 2 apart: norms after the branches instead of before; queries and keys are normalized over all heads together."""
    return {
        "qkv_bias": config.attention_bias,
        "output_bias": config.attention_bias,
        "norm_placement": "post",
        "qk_norm": "full",
    }
