"""Gemma 3's language model."""

from __future__ import annotations

from typing import Any

from dist_infer.model.families import gemma2, rope_by_layer_type


def traits(config: Any) -> dict[str, Any]:
    """What sets Gemma 3 apart from Gemma 2: normalized queries and keys, and another rotation where there is a window."""
    if config.attn_logit_softcapping is not None:  # its configuration has the field, its model does not
        raise ValueError(f"attn_logit_softcapping {config.attn_logit_softcapping!r} is not supported for gemma3_text; supported is null")
    return {**gemma2.traits(config), **rope_by_layer_type(config), "qk_norm": "head"}
