"""What a trainer's names mean: from canonical (Hugging Face) names to stored tensors and the order of their rows."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import ClassVar

from dist_infer.model.config import ModelConfig
from dist_infer.model.stored import Stored


class Dialect:
    """A trainer's naming, bound to the names of one checkpoint.

    A subclass gives the name of the token embedding and of one more weight that every model of the
    trainer has; whatever stands before the embedding in the checkpoint is the prefix of all its weights.
    """

    name: ClassVar[str]
    embedding: ClassVar[str]
    witness: ClassVar[str]

    def __init__(self, names: Collection[str], prefix: str) -> None:
        self.names = names
        self.prefix = prefix

    @classmethod
    def prefixes(cls, names: Collection[str]) -> list[str]:
        """The prefixes under which `names` hold a model of this dialect."""
        found = [name.removesuffix(cls.embedding) for name in names if name.endswith(cls.embedding)]
        return sorted(prefix for prefix in found if prefix[-1:] in ("", ".") and prefix + cls.witness in names)

    def map(self, name: str, config: ModelConfig) -> Stored:
        """Where the canonical tensor `name` is stored; the tensor need not be there."""
        raise NotImplementedError

    def is_buffer(self, name: str) -> bool:
        """Whether the stored tensor `name` is a table that is computed anew rather than read."""
        return re.search(r"(^|\.)(inv_freq|freqs_cis|rope\.cache|rope_cache|cos_cached|sin_cached)$", name) is not None


def translate(name: str, table: dict[str, str]) -> str:
    """`name` with its module path translated by `table`, a layer's number kept; unknown paths stay."""
    path, _, kind = name.rpartition(".")
    layer = re.match(r"model\.layers\.(\d+)\.", path)
    if layer is None:
        return f"{table.get(path, path)}.{kind}"
    rest = path[layer.end() :]
    return f"layers.{layer[1]}.{table.get(rest, rest)}.{kind}"
