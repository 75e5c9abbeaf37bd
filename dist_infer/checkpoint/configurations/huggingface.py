"""Hugging Face's config.json."""

from __future__ import annotations

from typing import Any

from dist_infer.checkpoint.configurations.shapes import Shapes
from dist_infer.model.config import ModelConfig
from dist_infer.model.families import FAMILIES, from_hf


def recognizes(data: dict[str, Any]) -> bool:
    """It names a model type."""
    return "model_type" in data


def read(data: dict[str, Any], shapes: Shapes) -> ModelConfig:
    """Read by transformers' own class for the model type; code that a configuration brings along is never looked at."""
    from transformers import CONFIG_MAPPING

    family = data["model_type"]
    if family not in CONFIG_MAPPING:
        remote = ", and code from a checkpoint is never run" if "auto_map" in data else ""
        raise ValueError(f"model_type {family!r} is not supported{remote}; supported are {', '.join(FAMILIES)}")
    return from_hf(CONFIG_MAPPING[family].from_dict({key: value for key, value in data.items() if key != "auto_map"}))
