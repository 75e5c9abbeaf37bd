"""Hugging Face's own names, plain or below a prefix (accelerate and most FSDP scripts write `model.`)."""

from __future__ import annotations

from dataclasses import replace

from dist_infer.checkpoint.dialects.dialect import Dialect
from dist_infer.model.config import ModelConfig
from dist_infer.model.families import stored
from dist_infer.model.stored import Stored


class HuggingFace(Dialect):
    """Canonical names are these."""

    name = "huggingface"
    embedding = "model.embed_tokens.weight"
    witness = "model.layers.0.self_attn.o_proj.weight"

    def map(self, name: str, config: ModelConfig) -> Stored:
        """The name below the prefix."""
        place = stored(name, config)
        return replace(place, tensor=self.prefix + place.tensor)
