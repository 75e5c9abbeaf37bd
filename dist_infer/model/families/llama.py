"""Llama 2, 3 and 3.1+ (and the many models that share its architecture)."""

from __future__ import annotations

from typing import Any


def traits(config: Any) -> dict[str, Any]:
    """What sets Llama apart: optional biases everywhere in attention or mlp."""
    return {"qkv_bias": config.attention_bias, "output_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
