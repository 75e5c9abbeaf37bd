"""Hugging Face's own names, plain or below a prefix (accelerate and most FSDP scripts write `model.`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from dist_infer.checkpoint.dialects.dialect import Dialect, prefixes_before
from dist_infer.model.config import ModelConfig
from dist_infer.model.families import landmarks, stored, unconverted
from dist_infer.model.stored import Stored

# Causal masks that older versions of GPT-2 and GPT-NeoX saved beside their weights.
_MASKS = re.compile(r"(^|\.)(h\.\d+\.attn|layers\.\d+\.attention)\.(bias|masked_bias)$")


def _bare(name: str) -> str:
    return name.partition(".")[2]


class HuggingFace(Dialect):
    """Canonical names are these, unless a family has others on disk."""

    name = "huggingface"

    @classmethod
    def landmarks(cls) -> list[tuple[str, str]]:
        """Of all families."""
        return landmarks()

    @classmethod
    def prefixes(cls, names: Mapping[str, str]) -> list[str]:
        """Also of a model saved without its head's class, whose names lack their first part (`model.`, `transformer.`)."""
        return super().prefixes(names) or prefixes_before([(_bare(e), _bare(w)) for e, w in landmarks()], names)

    @classmethod
    def prefixes_of(cls, config: ModelConfig, names: Mapping[str, str]) -> list[str]:
        """The prefixes under which `names` hold a model that runs as transformers' own module."""
        from dist_infer.model import fallback

        embedding = fallback.landmark(config)
        return [name.removesuffix(embedding) for name in names if name == embedding or name.endswith(f".{embedding}")]

    def place(self, name: str, config: ModelConfig) -> Stored:
        """The name the family has on disk, or in memory if that is what was saved, below the prefix."""
        place, other = stored(name, config), unconverted(name, config)
        if self.prefix + place.tensor not in self.names and self.prefix + other.tensor in self.names:
            place = other
        if self.prefix + place.tensor not in self.names and self.prefix + _bare(place.tensor) in self.names:
            place = replace(place, tensor=_bare(place.tensor))
        tensor = self.prefix + place.tensor
        return replace(place, tensor=self.names.get(tensor, tensor), pairs=place.pairs or self.pairs(name, config))

    def is_buffer(self, name: str) -> bool:
        """Also masks of old versions."""
        return super().is_buffer(name) or _MASKS.search(name) is not None
