"""Which bytes a rank reads, and where they go: a pure function of weights, mesh coordinates and index."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from dist_infer.checkpoint.dialects import Dialect
from dist_infer.checkpoint.sources.source import ITEM_SIZES, Chunk, TensorEntry
from dist_infer.model.config import ModelConfig
from dist_infer.model.stored import Rows, Stored
from dist_infer.model.weights import Weight, fsdp_rows


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
        spread: From one element of a run to the next, there; more than 1 when the matrix is stored transposed.
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
    spread: int = 1

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
            stored = dialect.map(piece.name, config)
            target = _Target(weight.parameter, (*piece.box, (0, 1))[1], piece.box[0][0] - piece.row + first)
            for rows in stored.rows(start + target.shift - first, stop + target.shift - first):
                reads += _reads(target, stored, index[stored.tensor], rows)
    return reads


class _Target(NamedTuple):
    """Where a piece goes: a matrix whose columns are `columns` of the canonical one.

    Attributes:
        parameter: The parameter it fills.
        columns: (start, stop); (0, 1) for a vector.
        shift: From a row of the rank's part of the parameter to the canonical row it holds.
    """

    parameter: str
    columns: tuple[int, int]
    shift: int

    def at(self, row: int, column: int) -> int:
        """Element of the rank's part for a canonical row and column."""
        return (row - self.shift) * self.width + column - self.columns[0]

    @property
    def width(self) -> int:
        """Elements of a row."""
        return self.columns[1] - self.columns[0]


def _reads(target: _Target, stored: Stored, entry: TensorEntry, rows: Rows) -> Iterator[Read]:
    """Reads of `rows` of one canonical tensor."""
    along = (rows.stored, rows.stored + (rows.length - 1) * rows.step + 1)
    first = (stored.member, stored.member + 1) if stored.member is not None else target.columns if stored.transposed else along
    for chunk in entry.touching(*first):
        box, base = chunk.box, 0
        if stored.member is not None:
            (low, high), *box = box
            if not low <= stored.member < high:
                continue
            base = (stored.member - low) * math.prod(stop - start for start, stop in box)
        (top, bottom), (left, right) = (*box, (0, 1))[:2]
        read = _read_transposed if stored.transposed else _read
        found = read(target, rows, (top, bottom), (left, right))
        if found is not None:
            start, length, stride, runs, destination, step, spread = found
            yield Read(chunk, entry.dtype, base + start, length, stride, runs, target.parameter, destination, step, spread)


def _read(
    target: _Target, rows: Rows, held_rows: tuple[int, int], held_columns: tuple[int, int]
) -> tuple[int, int, int, int, int, int, int] | None:
    """What a chunk that holds a box of the stored matrix gives: start, length, stride, runs, destination, step, spread."""
    canonical, stored, step, count = rows
    (top, bottom), (left, right) = held_rows, held_columns
    skip = max(0, -((stored - top) // step))  # rows of the run that lie above the chunk
    held = min(count, -((stored - bottom) // step)) - skip
    low, high = max(left, target.columns[0]), min(right, target.columns[1])
    if held <= 0 or low >= high:
        return None
    width, length = right - left, high - low
    start, destination = (stored + skip * step - top) * width + low - left, target.at(canonical + skip, low)
    if held == 1 or step * width == target.width == length:
        return start, held * length, held * length, 1, destination, held * length, 1
    return start, length, step * width, held, destination, target.width, 1


def _read_transposed(
    target: _Target, rows: Rows, held_rows: tuple[int, int], held_columns: tuple[int, int]
) -> tuple[int, int, int, int, int, int, int] | None:
    """The same of a matrix that is stored transposed: canonical rows are its columns."""
    canonical, stored, step, count = rows
    assert step == 1, "rotary pairs side by side in a transposed matrix"
    (top, bottom), (left, right) = held_rows, held_columns
    low, high = max(left, stored), min(right, stored + count)
    first, last = max(top, target.columns[0]), min(bottom, target.columns[1])
    if low >= high or first >= last:
        return None
    width, destination = right - left, target.at(canonical + low - stored, first)
    return (first - top) * width + low - left, high - low, width, last - first, destination, 1, target.width
