"""Distributed inference from sharded checkpoints, where they lie.

The names below are loaded on first use, so that importing the package (for `--help`) costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_infer.config.sampling import SamplingParams
    from dist_infer.engine.llm import LLM
    from dist_infer.engine.load_model import load_model
    from dist_infer.sampling.sample import sample

__all__ = ["LLM", "SamplingParams", "load_model", "sample"]

_HOMES = {
    "LLM": "dist_infer.engine.llm",
    "SamplingParams": "dist_infer.config.sampling",
    "load_model": "dist_infer.engine.load_model",
    "sample": "dist_infer.sampling.sample",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dist_infer' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
