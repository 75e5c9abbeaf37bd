"""Which bytes a rank reads, and where they go: a pure function of weights, mesh coordinates and index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from dist_infer.checkpoint.dialects import Dialect, Rows
from dist_infer.checkpoint.sources.source import ITEM_SIZES, Chunk, TensorEntry
from dist_infer.model.config import ModelConfig
from dist_infer.model.weights import Piece, Weight, fsdp_rows


class Read(NamedTuple):
    """`runs` runs of elements from one chunk into one parameter; everything is counted in elements.

    Attributes:
        chunk: Where the elements are stored.
        dtype: What they are stored as.
        start: First element of the first run, from the chunk's first element.
        length: Elements of a run.
        stride: From one run's first element to the next one's, in the chunk.
        runs: How many runs.
        parameter: Name of the parameter they fill.
        destination: Where the first run goes in the rank's part of the parameter.
        step: From one run to the next, there.
    """

    chunk: Chunk
    dtype: str
    start: int
    length: int
    stride: int
    runs: int
    parameter: str
    destination: int
    step: int

    @property
    def elements(self) -> int:
        """Elements it brings."""
        return self.length * self.runs

    @property
    def bytes(self) -> int:
        """Bytes it brings, as they are stored."""
        return self.elements * ITEM_SIZES[self.dtype]


def plan(
    weights: Iterable[Weight],
    fsdp: int,
    coordinate: int,
    index: Mapping[str, TensorEntry],
    dialect: Dialect,
    config: ModelConfig,
) -> list[Read]:
    """The reads that fill every row of `weights` that fsdp coordinate `coordinate` of `fsdp` holds.

    Args:
        weights: What a tp rank holds.
        fsdp: Ranks that share those rows between them.
        coordinate: Which of these this is.
        index: The checkpoint's tensors, matched with the model already.
        dialect: What they are called.
        config: The model.
    """
    reads: list[Read] = []
    for weight in weights:
        first, last = fsdp_rows(weight.shape[0], fsdp, coordinate)
        for piece in weight.pieces:
            start, stop = max(first, piece.row), min(last, piece.row + piece.rows)
            if start >= stop:
                continue
            mapping = dialect.map(piece.name, config)
            entry = index[mapping.tensor]
            shift = piece.box[0][0] - piece.row  # from a row of the buffer to a row of the canonical tensor
            for rows in mapping.rows(start + shift, stop + shift):
                reads += _rows_from_chunks(weight, piece, entry, rows, shift + first)
    return reads


class _Inner(NamedTuple):
    """How the dims after the first lie in a chunk and in a parameter, in elements.

    Attributes:
        start: Of the wanted elements in a row of the chunk.
        destination: Of the same in a row of the parameter.
        length: Elements wanted of a row; they follow one another in both.
        stored_row: Elements of a row of the chunk.
        local_row: Elements of a row of the parameter.
    """

    start: int
    destination: int
    length: int
    stored_row: int
    local_row: int


def _inner(weight: Weight, piece: Piece, chunk: Chunk) -> _Inner | None:
    """What `chunk` and `piece` share of a row; None when they share nothing."""
    start, destination, length, stored_row, local_row = 0, 0, 1, 1, 1
    for (low, high), (wanted, end), size in zip(chunk.box[:0:-1], piece.box[:0:-1], weight.shape[:0:-1], strict=True):
        count = min(high, end) - max(low, wanted)
        if count <= 0:
            return None
        start += max(wanted - low, 0) * stored_row
        destination += max(low - wanted, 0) * local_row
        assert stored_row == local_row == length or count == 1, f"{piece.name}: cut in more than one dim after the first"
        length *= count
        stored_row *= high - low
        local_row *= size
    return _Inner(start, destination, length, stored_row, local_row)


def _rows_from_chunks(weight: Weight, piece: Piece, entry: TensorEntry, rows: Rows, shift: int) -> Iterator[Read]:
    """Reads of `rows` of one tensor; `shift` leads from a canonical row to one of the rank's part."""
    canonical, stored, step, count = rows
    columns, inner = None, None
    for chunk in entry.touching(stored, stored + (count - 1) * step + 1):
        if chunk.box[1:] != columns:
            columns, inner = chunk.box[1:], _inner(weight, piece, chunk)
        top, bottom = chunk.box[0]
        skip = max(0, -((stored - top) // step))  # rows of the run that lie above the chunk
        held = min(count, -((stored - bottom) // step)) - skip
        if inner is None or held <= 0:
            continue
        start = inner.start + (stored + skip * step - top) * inner.stored_row
        destination = inner.destination + (canonical + skip - shift) * inner.local_row
        row_step = step * inner.stored_row
        if held == 1 or row_step == inner.local_row == inner.length:
            length = held * inner.length
            yield Read(chunk, entry.dtype, start, length, length, 1, weight.parameter, destination, length)
        else:
            yield Read(chunk, entry.dtype, start, inner.length, row_step, held, weight.parameter, destination, inner.local_row)
