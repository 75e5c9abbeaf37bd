"""SmolLM3."""

from __future__ import annotations

from typing import Any

from dist_infer.model.families import sliding_windows


def traits(config: Any) -> dict[str, Any]:
    """What sets SmolLM3 apart: every few layers there is one without rotation."""
    return {
        "qkv_bias": config.attention_bias,
        "output_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "unrotated_layers": tuple(layer for layer in range(config.num_hidden_layers) if not config.no_rope_layers[layer]),
        "sliding_windows": sliding_windows(config) if config.use_sliding_window else (),
    }
