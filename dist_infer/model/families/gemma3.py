"""Gemma 3 with its vision tower: the language model alone is run."""

from __future__ import annotations

from dist_infer.model.families.gemma3_text import traits

__all__ = ["traits"]
