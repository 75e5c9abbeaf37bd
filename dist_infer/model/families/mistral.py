"""Mistral: Llama with a sliding window on every layer."""

from __future__ import annotations

from typing import Any


def traits(config: Any) -> dict[str, Any]:
    """What sets Mistral apart: every layer sees only the last `sliding_window` tokens."""
    return {"sliding_windows": (config.sliding_window,) * config.num_hidden_layers if config.sliding_window else ()}
