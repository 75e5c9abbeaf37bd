"""OLMo 3."""

from __future__ import annotations

from typing import Any

from dist_infer.model.families import olmo2, rope_by_layer_type, sliding_windows


def traits(config: Any) -> dict[str, Any]:
    """What sets OLMo 3 apart from OLMo 2: most layers have a window, and those without one may rotate otherwise."""
    return {**olmo2.traits(config), **rope_by_layer_type(config), "sliding_windows": sliding_windows(config)}
