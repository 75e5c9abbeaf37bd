"""What a trainer's names mean: from canonical (Hugging Face) names to stored tensors and the order of their rows."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from dist_infer.model.config import ModelConfig


class Rows(NamedTuple):
    """`length` canonical rows from `canonical` on, which are the stored rows `stored`, `stored + step`, ..."""

    canonical: int
    stored: int
    step: int
    length: int


@dataclass(frozen=True)
class Mapping:
    """Where a canonical tensor is stored.

    Attributes:
        tensor: Name of the stored tensor.
        pairs: Elements of a head whose rotary pairs are stored side by side (rows 2i and 2i + 1 of the head
            are canonical rows i and i + pairs / 2); 0 when rows are stored as they are canonically.
    """

    tensor: str
    pairs: int = 0

    def rows(self, start: int, stop: int) -> Iterator[Rows]:
        """Where canonical rows `start` to `stop` are stored, in canonical order."""
        if not self.pairs:
            yield Rows(start, start, 1, stop - start)
            return
        half_size = self.pairs // 2
        while start < stop:
            half, first = divmod(start, half_size)
            length = min(half_size - first, stop - start)
            yield Rows(start, half // 2 * self.pairs + 2 * first + half % 2, 2, length)
            start += length


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

    def map(self, name: str, config: ModelConfig) -> Mapping:
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
