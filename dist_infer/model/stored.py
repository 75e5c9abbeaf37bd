"""How a canonical tensor lies in a stored one: alone, as rows of a fused matrix, transposed, or as one of a pack of experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Rows(NamedTuple):
    """`length` canonical rows from `canonical` on, which are the stored rows `stored`, `stored + step`, ..."""

    canonical: int
    stored: int
    step: int
    length: int


@dataclass(frozen=True)
class Stored:
    """Where a canonical tensor is stored.

    A fused matrix holds its parts in rows: canonical rows come in groups of `group` rows, and group g begins at stored row
    `offset + g * stride`. Q, K and V one after another need only an `offset`; interleaved by head or KV group, also the
    other two.

    Attributes:
        tensor: Name of the stored tensor.
        shape: What its shape must be; None when it is the canonical tensor's own.
        offset: Stored row of canonical row 0.
        group: Canonical rows that lie together; 0 when all do.
        stride: Stored rows from one group to the next.
        pairs: Elements of a head whose rotary pairs are stored side by side (rows 2i and 2i + 1 of the head
            are canonical rows i and i + pairs / 2); 0 when rows are stored as they are canonically. Divides `group`.
        member: Index along the first dim of a stored pack of matrices, such as experts; None when it is no pack.
        transposed: Whether the stored matrix is [inputs, outputs]; "rows" above are then its columns.
    """

    tensor: str
    shape: tuple[int, ...] | None = None
    offset: int = 0
    group: int = 0
    stride: int = 0
    pairs: int = 0
    member: int | None = None
    transposed: bool = False

    def rows(self, start: int, stop: int) -> Iterator[Rows]:
        """Where canonical rows `start` to `stop` are stored, in canonical order."""
        while start < stop:
            place, length = self.offset + start, stop - start
            if self.group:
                number, within = divmod(start, self.group)
                place, length = self.offset + number * self.stride + within, min(length, self.group - within)
            yield from self._unpaired(start, place, length)
            start += length

    def _unpaired(self, start: int, place: int, length: int) -> Iterator[Rows]:
        """Rows of one group; `place` is where its row `start` would lie if no pairs lay side by side."""
        if not self.pairs:
            yield Rows(start, place, 1, length)
            return
        half_size, shift, stop = self.pairs // 2, place - start, start + length
        while start < stop:
            half, first = divmod(start, half_size)
            length = min(half_size - first, stop - start)
            yield Rows(start, shift + half // 2 * self.pairs + 2 * first + half % 2, 2, length)
            start += length
