"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from typing import Any

from dist_infer.model.families import sliding_windows


def traits(config: Any) -> dict[str, Any]:
    """What sets Qwen2 apart: biases on Q, K and V alone; windows on the upper layers where asked for."""
    return {"qkv_bias": True, "sliding_windows": sliding_windows(config)}
